"""Chronos-2: an encoder over patches of time series and over the series of a group (Ansari et al. 2025,
arXiv 2510.15821): quantile forecasts of many series at once, with covariates, without training.

Shapes: B rows (single series: targets or covariates), T steps of history, P steps of a patch, N patches of
history, n of the future, S = N + 1 + n tokens with the register token, Q quantiles, D channels, H heads of d
channels. Tokens are `(S, B, D)` inside: attention over time and over rows are then both views.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.forecasting.models.encoder import ACTIVATIONS, Attention, Block, Encoder, ResidualBlock, RMSNorm
from domains.forecasting.models.folded import FoldedEncoder, residual
from domains.forecasting.models.groups import RowGroups
from domains.forecasting.models.outputs import Chronos2Output, Embedded, Encoding
from domains.forecasting.models.patches import (
    denormalise,
    location_and_scale,
    normalise,
    patches,
    quantile_loss,
)
from domains.forecasting.weights import Chronos2Official
from zoo.attention import rotary_tables
from zoo.attention.capture import recorder
from zoo.attention.layers import AttentionLayer
from zoo.attention.layers.multihead import MultiHead
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.registry import register_model

QUANTILES = (0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99)


class Chronos2(nn.Module):
    """Quantile forecasts of many series, alone or in groups, with past and known future covariates.

    Every row is one series in its own scale. Rows of one group exchange information at each token: the
    targets and covariates of one forecast, or related series. What is known of the future enters as values
    of the future patches; a row whose future is known is a covariate.

    Args:
        d_model, d_kv, d_ff: channels of a token, of a head and of the hidden layers.
        num_layers, num_heads: of the encoder.
        dropout_rate: after every branch, and of attention weights.
        layer_norm_epsilon: of all norms.
        initializer_factor: scales all initial weights. The published 0.05 learns slowly in short runs; 0.3 is
            better there.
        activation: of the MLPs.
        rope_theta: of the rotary positions.
        context_length: steps of history that are read at most.
        patch_size, patch_stride: steps of a patch, and between the starts of patches of the history.
        max_output_patches: patches that one pass forecasts at most (`Forecaster` goes on from there).
        quantiles: levels that are forecast.
        time_encoding_scale: steps that make 1 of the time index; `context_length` by default.
        use_arcsinh: asinh after scaling.
        use_reg_token: a register token between history and future.
        unseen: what a row gets at a token that no row of its group may show (a patch missing in all of them):
            `uniform`, as published, the mean over all rows of the batch, other groups included; `zero`.
            Forecasts do not depend on it, only the embeddings of these tokens.
        attention: another layer over time, of those in `zoo list attention` that see both ways and take
            padded rows: its name, or a mapping with name and arguments. None: as published.
    """

    def __init__(
        self,
        *,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_heads: int = 8,
        dropout_rate: float = 0.1,
        layer_norm_epsilon: float = 1e-6,
        initializer_factor: float = 0.05,
        activation: str = "relu",
        rope_theta: float = 10_000.0,
        context_length: int = 8192,
        patch_size: int = 16,
        patch_stride: int | None = None,
        max_output_patches: int = 64,
        quantiles: Sequence[float] = QUANTILES,
        time_encoding_scale: float | None = None,
        use_arcsinh: bool = True,
        use_reg_token: bool = True,
        unseen: Literal["uniform", "zero"] = "uniform",
        attention: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_options(activation, quantiles, unseen, d_kv, num_layers, context_length, patch_size)
        self.d_model, self.d_kv, self.d_ff = d_model, d_kv, d_ff
        self.num_layers, self.num_heads, self.activation = num_layers, num_heads, activation
        self.dropout_rate, self.layer_norm_epsilon = dropout_rate, layer_norm_epsilon
        self.rope_theta = rope_theta
        self.initializer_factor = initializer_factor
        self.context_length = context_length
        self.patch_size = patch_size
        self.patch_stride = patch_size if patch_stride is None else patch_stride
        self.max_output_patches = max_output_patches
        self.quantiles = tuple(quantiles)
        self.time_encoding_scale = context_length if time_encoding_scale is None else time_encoding_scale
        self.use_arcsinh = use_arcsinh
        self.use_reg_token = use_reg_token
        self.unseen = unseen
        self.attention = attention
        self._folded: FoldedEncoder | None = None  # in use
        self._kept: FoldedEncoder | None = None  # for the next use
        self.shared = nn.Embedding(2 if use_reg_token else 1, d_model)
        self.input_patch_embedding = ResidualBlock(3 * patch_size, d_ff, d_model, activation, dropout_rate)
        sizes = (d_model, d_kv, num_heads, d_ff, activation, dropout_rate, layer_norm_epsilon)
        blocks = [Block(*sizes, attention=attention) for _ in range(num_layers)]
        self.encoder = Encoder(blocks, d_model, dropout_rate, layer_norm_epsilon)
        out = len(self.quantiles) * patch_size
        self.output_patch_embedding = ResidualBlock(d_model, d_ff, out, activation, dropout_rate)
        self.register_buffer("levels", torch.tensor(self.quantiles), persistent=False)
        self.reset_parameters()

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that build this model, with what defaults and later changes made of them."""
        names = inspect.signature(type(self)).parameters
        return {name: list(self.quantiles) if name == "quantiles" else getattr(self, name) for name in names}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights; queries get smaller ones, as attention has no scale. Other layers over time keep
        theirs.
        """
        factor = self.initializer_factor
        nn.init.normal_(self.shared.weight, std=factor)
        kept = {
            id(m) for layer in self.modules() if isinstance(layer, AttentionLayer) for m in layer.modules()
        }
        for module in self.modules():
            if id(module) in kept:
                continue
            if isinstance(module, RMSNorm):
                nn.init.constant_(module.weight, factor)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=factor * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.q.weight, std=factor * (self.d_model * self.d_kv) ** -0.5)

    def core_layers(self) -> dict[str, MultiHead]:
        """Its own attention over time as layers of the core, by the name of the module that holds another."""
        return {f"encoder.{name}": own for name, own in self.encoder.core_layers(self.rope_theta).items()}

    # ---- from series to tokens -----------------------------------------------------------------------------

    def embed(
        self,
        context: Tensor,
        context_mask: Tensor | None,
        future: Tensor | None,
        future_mask: Tensor | None,
        num_output_patches: int,
        *,
        drop_unseen: bool = False,
    ) -> Embedded:
        """The tokens of checked inputs, as `forward` takes them.

        Args:
            drop_unseen: leave out the first patches, as far as no row has a value in them.
        """
        context = context[:, -self.context_length :]
        observed = (~context.isnan()).float() if context_mask is None else context_mask.float()
        observed = observed[:, -self.context_length :]
        loc, scale = location_and_scale(context)
        z = normalise(context, loc, scale, arcsinh=self.use_arcsinh)
        past, seen = self._past_tokens(z, observed, drop_unseen)
        if future is not None:
            future = normalise(future, loc, scale, arcsinh=self.use_arcsinh)
        ahead, known = self._future_tokens(future, future_mask, num_output_patches)
        rows = context.shape[0]
        parts = [past, ahead.expand(-1, rows, -1)]
        if self.use_reg_token:
            parts.insert(1, self.shared.weight[1].to(past.dtype).expand(1, rows, -1))
        always = seen.new_ones((sum(map(len, parts[1:])), rows))
        alike = len(always) if future is None else 0
        return Embedded(torch.cat(parts), torch.cat([seen, always]), loc, scale, known, alike)

    def _past_tokens(self, z: Tensor, observed: Tensor, drop_unseen: bool) -> tuple[Tensor, Tensor]:
        """Tokens `(N, B, D)` of values and their mask `(B, T)`, and bool `(N, B)` whether they hold any."""
        size, stride = self.patch_size, self.patch_stride
        mask = patches(observed, size, stride, fill=0.0)
        seen = mask.sum(-1) > 0
        start = int(seen[:, :-1].any(0).int().cumsum(0).eq(0).sum()) if drop_unseen else 0
        count = mask.shape[1]
        time = torch.arange(-count * size, 0, device=z.device).view(count, 1, size) / self.time_encoding_scale
        mask = mask[:, start:]
        values = torch.where(mask > 0, patches(z, size, stride, fill=torch.nan)[:, start:], 0.0)
        tokens = self._patch_tokens(time[start:], values.transpose(0, 1), mask.transpose(0, 1))
        return tokens, seen[:, start:].T

    def _future_tokens(
        self, z: Tensor | None, mask: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens `(n, B, D)` of what is known of the future `(B, F)`, and the mask `(B, n P)` of that.

        Without covariates all rows have the same future: `(n, 1, D)`.
        """
        size = self.patch_size
        time = torch.arange(count * size, device=self.shared.weight.device).view(count, 1, size)
        time = time / self.time_encoding_scale
        if z is None:
            return self._patch_tokens(time, torch.zeros_like(time), torch.zeros_like(time)), None
        known = (~z.isnan()).float() if mask is None else mask.float()
        values = torch.where(known > 0, z, 0.0)
        values, known = (F.pad(x, (0, count * size - x.shape[1])) for x in (values, known))
        return self._patch_tokens(
            time, *(x.unflatten(1, (count, size)).transpose(0, 1) for x in (values, known))
        ), known

    def _patch_tokens(self, time: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Time index `(N, 1, P)`, values and mask `(N, B, P)` -> `(N, B, D)`."""
        features = torch.cat([time.expand_as(values), values, mask], -1)
        return self._through(self.input_patch_embedding, features.to(self.shared.weight.dtype))

    # ---- forward -------------------------------------------------------------------------------------------

    def encode(
        self,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        group_ids: Tensor | RowGroups | None = None,
        future_covariates: Tensor | None = None,
        future_covariates_mask: Tensor | None = None,
        num_output_patches: int = 1,
    ) -> Encoding:
        """All tokens after the encoder, for the arguments of `forward`."""
        self._check(context, context_mask, future_covariates, future_covariates_mask, num_output_patches)
        embedded = self.embed(
            context, context_mask, future_covariates, future_covariates_mask, num_output_patches
        )
        tokens = self._encoded(embedded, _groups(group_ids, context), len(embedded.tokens))
        return Encoding(tokens.transpose(0, 1), embedded.loc, embedded.scale)

    def forward(
        self,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        group_ids: Tensor | RowGroups | None = None,
        future_covariates: Tensor | None = None,
        future_covariates_mask: Tensor | None = None,
        num_output_patches: int = 1,
        future_target: Tensor | None = None,
        future_target_mask: Tensor | None = None,
    ) -> Chronos2Output:
        """Forecast the `num_output_patches` patches that follow the context.

        Args:
            context: `(B, T)`, NaN where missing; longer ones are cut to the last `context_length` steps.
            context_mask: `(B, T)`, 1 where a value counts; by default where it is not NaN. The scale of a row
                comes from all its values.
            group_ids: integers `(B,)`, rows of the same group see each other; by default every row is alone.
                For a compiled model, `RowGroups.of(ids)` made outside.
            future_covariates: `(B, F)`, known future values, F at most n P; NaN where unknown.
            future_covariates_mask: `(B, F)`, 1 where known; by default where not NaN.
            num_output_patches: n.
            future_target: `(B, F)`, NaN where missing, for the loss.
            future_target_mask: `(B, F)`, 1 where the target counts; by default where it is not NaN.

        Raises:
            DataError: shapes that do not fit, or NaN under a mask that counts it.
        """
        self._check(context, context_mask, future_covariates, future_covariates_mask, num_output_patches)
        self._check_future("future_target", future_target, future_target_mask, context, num_output_patches)
        embedded = self.embed(
            context,
            context_mask,
            future_covariates,
            future_covariates_mask,
            num_output_patches,
            drop_unseen=self._drops_unseen(),
        )
        groups = _groups(group_ids, context)
        z = self._encoded(embedded, groups, num_output_patches)[-num_output_patches:]
        z = self._through(self.output_patch_embedding, z)
        z = z.unflatten(-1, (len(self.quantiles), self.patch_size)).permute(1, 2, 0, 3).flatten(2)
        loc, scale = embedded.loc, embedded.scale
        quantiles = denormalise(z.flatten(1), loc, scale, arcsinh=self.use_arcsinh).view(z.shape)
        scored = future_target is not None
        loss = self._loss(z, future_target, future_target_mask, embedded) if scored else None
        return Chronos2Output(quantiles, loss, z, loc, scale)

    def _encoded(self, embedded: Embedded, groups: RowGroups, keep: int) -> Tensor:
        """At least the last `keep` tokens `(., B, D)` after the encoder, rows in their own order."""
        tokens, seen = embedded.tokens, embedded.seen
        order = groups.order
        if order is not None:
            tokens, seen, groups = tokens[:, order], seen[:, order], groups.sorted()
        everything = not torch.compiler.is_compiling() and bool(seen.all())
        if recorder() is not None:
            keep = len(tokens)  # maps of all layers have one shape
        positions = torch.arange(len(tokens), device=tokens.device)
        tables = rotary_tables(positions, self.d_kv, theta=self.rope_theta)
        inputs = (tokens, keep, tables, groups, None if everything else seen, self.unseen)
        fast = self._in_use()
        tokens = self.encoder(*inputs) if fast is None else fast(*inputs, alike=embedded.alike)
        return tokens if order is None else tokens[:, order.argsort()]

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Forward passes inside, without gradients, run with combined weights: faster, the same numbers.

        Combining takes about the time of a pass over D tokens. The result is kept, in about
        the memory of the encoder, until a weight has another value; changes inside, or of a few elements
        through `.data`, go unnoticed.
        """
        if self._kept is None or self._kept.is_outdated(self.encoder):
            self._kept = FoldedEncoder.of(self.encoder)
        self._folded = self._kept
        try:
            yield
        finally:
            self._folded = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles come without combined weights, which are made again when needed."""
        return {**self.__dict__, "_folded": None, "_kept": None}

    def _drops_unseen(self) -> bool:
        """Whether first patches without a value may be left out: only distances in time count."""
        return self.attention is None and not torch.compiler.is_compiling() and recorder() is None

    def _through(self, block: ResidualBlock, x: Tensor) -> Tensor:
        return block(x) if self._in_use() is None else residual(block, x)

    def _in_use(self) -> FoldedEncoder | None:
        """The combined weights, where this pass may run with them."""
        plain = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        special = recorder() is not None or torch.is_autocast_enabled(self.shared.weight.device.type)
        return None if plain or special else self._folded

    def _loss(self, z: Tensor, target: Tensor, mask: Tensor | None, embedded: Embedded) -> Tensor:
        """Quantile loss: mean over the steps (those that do not count, too) and rows, sum over the levels.

        Steps whose future was given do not count.
        """
        z = z.float()
        target = normalise(target, embedded.loc, embedded.scale, arcsinh=self.use_arcsinh)
        counts = (~target.isnan()).float() if mask is None else mask.float()
        target = torch.where(counts > 0, target, 0.0)
        ahead = z.shape[-1] - target.shape[-1]
        target, counts = F.pad(target, (0, ahead)), F.pad(counts, (0, ahead))
        if embedded.known is not None:
            counts = counts * (1 - embedded.known)
        loss = quantile_loss(z, target, self.get_buffer("levels")) * counts[:, None]
        return loss.mean(-1).sum(-1).mean()

    # ---- checks --------------------------------------------------------------------------------------------

    def _check(
        self,
        context: Tensor,
        context_mask: Tensor | None,
        future: Tensor | None,
        future_mask: Tensor | None,
        num_output_patches: int,
    ) -> None:
        if context.ndim != 2 or not context.numel():
            raise DataError(f"A context has rows and steps (B, T), not {list(context.shape)}.")
        if num_output_patches < 1:
            raise DataError(f"num_output_patches={num_output_patches} is not at least 1.")
        if context_mask is not None:
            _check_mask("context_mask", context_mask, context)
        self._check_future("future_covariates", future, future_mask, context, num_output_patches)

    def _check_future(
        self, name: str, values: Tensor | None, mask: Tensor | None, context: Tensor, count: int
    ) -> None:
        if values is None:
            if mask is not None:
                raise DataError(f"{name}_mask is given without {name}.")
            return
        if values.ndim != 2 or len(values) != len(context):
            raise DataError(
                f"{name} has shape {list(values.shape)}, not (B, F) with the {len(context)} rows of the "
                "context."
            )
        if values.shape[1] > count * self.patch_size:
            raise DataError(
                f"{name} has {values.shape[1]} steps; num_output_patches={count} has room for "
                f"{count * self.patch_size}."
            )
        if mask is not None:
            _check_mask(f"{name}_mask", mask, values)


def _groups(given: Tensor | RowGroups | None, context: Tensor) -> RowGroups:
    rows = len(context)
    if given is None:
        return RowGroups.alone(rows, context.device)
    groups = given if isinstance(given, RowGroups) else RowGroups.of(given.to(context.device))
    if len(groups.member) != rows:
        raise DataError(f"There are {len(groups.member)} group ids for {rows} rows.")
    return groups


def _check_mask(name: str, mask: Tensor, values: Tensor) -> None:
    if mask.shape != values.shape:
        raise DataError(f"{name} has shape {list(mask.shape)}, not {list(values.shape)} of its values.")
    if not torch.compiler.is_compiling() and bool((values.isnan() & (mask > 0)).any()):
        raise DataError(f"{name} counts values that are NaN; leave it out to count what is not NaN.")


def _check_options(
    activation: str,
    quantiles: Sequence[float],
    unseen: str,
    d_kv: int,
    num_layers: int,
    context_length: int,
    patch_size: int,
) -> None:
    if activation not in ACTIVATIONS:
        hint = did_you_mean(activation, ACTIVATIONS)
        raise ConfigError(
            f"There is no activation {activation!r}.{hint} It is one of {', '.join(ACTIVATIONS)}."
        )
    if unseen not in ("uniform", "zero"):
        raise ConfigError(f"unseen={unseen!r} is neither 'uniform' nor 'zero'.")
    if (
        not quantiles
        or list(quantiles) != sorted(set(quantiles))
        or not 0 < quantiles[0] <= quantiles[-1] < 1
    ):
        raise ConfigError(f"quantiles are ascending levels between 0 and 1, not {list(quantiles)}.")
    if d_kv % 2 or min(d_kv, num_layers, context_length, patch_size) < 1:
        raise ConfigError(
            f"d_kv={d_kv} must be even, and num_layers={num_layers}, context_length={context_length} and "
            f"patch_size={patch_size} at least 1."
        )


_register = partial(
    register_model,
    model=Chronos2,
    paper="Ansari et al., Chronos-2: From Univariate to Universal Forecasting, arXiv 2510.15821, 2025",
    licence="Apache-2.0",
    source="https://github.com/amazon-science/chronos-forecasting",
    status="official parity",
    official=Chronos2Official,
    preprocessing={"scaling": "mean and std of each context, then asinh", "missing": "NaN"},
)


@_register(
    summary="Forecasts with covariates and related series, zero-shot: 120M parameters",
    weights=("chronos2", "chronos2_synth"),
)
def chronos2(
    *,
    d_model: int = 768,
    d_ff: int = 3072,
    num_layers: int = 12,
    num_heads: int = 12,
    **kwargs,
) -> Chronos2:
    return Chronos2(d_model=d_model, d_ff=d_ff, num_layers=num_layers, num_heads=num_heads, **kwargs)


@_register(summary="The smaller published Chronos-2: 28M parameters", weights=("chronos2_small",))
def chronos2_small(**kwargs) -> Chronos2:
    return Chronos2(**kwargs)


@_register(summary="Chronos-2 of 0.35M parameters, to be trained from scratch in minutes")
def chronos2_mini(
    *,
    d_model: int = 64,
    d_kv: int = 16,
    d_ff: int = 256,
    num_layers: int = 3,
    num_heads: int = 4,
    dropout_rate: float = 0.0,
    initializer_factor: float = 0.3,
    context_length: int = 512,
    **kwargs,
) -> Chronos2:
    return Chronos2(
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        dropout_rate=dropout_rate,
        initializer_factor=initializer_factor,
        context_length=context_length,
        **kwargs,
    )
