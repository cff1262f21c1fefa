"""Chronos-2: what its formula promises, and its forms: grouped, folded, compiled, in half precision."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from domains.forecasting.models import folded
from domains.forecasting.models.chronos2 import Chronos2
from domains.forecasting.models.groups import RowGroups
from zoo.attention import backend, capture
from zoo.errors import ConfigError, DataError

SMALL = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 0.4,
    "context_length": 128,
}


def small(**options) -> Chronos2:
    model = zoo.create_model("chronos2", **(SMALL | options)).eval()
    assert isinstance(model, Chronos2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def series(rows: int, steps: int = 90) -> Tensor:
    """Random walks with a gap in places, the second row much shorter."""
    x = torch.randn(rows, steps).cumsum(1)
    x[torch.rand(x.shape) < 0.1] = torch.nan
    x[1, :60] = torch.nan
    return x


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---- groups ------------------------------------------------------------------------------------------------

IDS = {
    "alone": [4, 1, 3, 0, 5, 2],
    "pairs side by side": [7, 7, 2, 2, 5, 5],
    "pairs apart": [7, 2, 5, 2, 7, 5],
    "of different sizes": [1, 0, 1, 3, 1, 0],
    "all": [0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("kind", IDS)
def test_a_group_is_forecast_as_if_there_were_no_other(kind: str) -> None:
    model, x, ids = small(), series(6), torch.tensor(IDS[kind])
    future = torch.full((6, 20), torch.nan)
    future[2, :12] = torch.randn(12)
    with torch.no_grad():
        together = model(x, group_ids=ids, future_covariates=future, num_output_patches=2).normalised
        for group in ids.unique():
            rows = ids == group
            same = torch.zeros(int(rows.sum()), dtype=torch.long)
            part = model(x[rows], group_ids=same, future_covariates=future[rows], num_output_patches=2)
            close(together[rows], part.normalised)


@pytest.mark.parametrize("kind", IDS)
def test_backends_agree(kind: str) -> None:
    model, x, ids = small(), series(6), torch.tensor(IDS[kind])
    with torch.no_grad():
        fast = model(x, group_ids=ids, num_output_patches=2).normalised
        with backend("reference"):
            close(fast, model(x, group_ids=ids, num_output_patches=2).normalised)


@pytest.mark.parametrize("kind", IDS)
def test_folded_weights_give_the_same(kind: str) -> None:
    model, x, ids = small(), series(6), torch.tensor(IDS[kind])
    for context in (x, x.nan_to_num()):
        with torch.no_grad():
            plain = model(context, group_ids=ids, num_output_patches=2).normalised
            tokens = model.encode(context, group_ids=ids).tokens
            with model.folded():
                close(model(context, group_ids=ids, num_output_patches=2).normalised, plain)
                close(model.encode(context, group_ids=ids).tokens, tokens)
                model.encoder.block[0].layer[2].mlp.wi.weight.zero_()  # folded weights are a copy
                close(model(context, group_ids=ids, num_output_patches=2).normalised, plain)
        model = small()


def test_folded_weights_follow_the_weights() -> None:
    model, x = small(), series(6)
    with torch.no_grad():
        with model.folded():
            before = model(x, num_output_patches=1).normalised
            first = model._folded
        with model.folded():
            assert model._folded is first
        model.encoder.block[1].layer[2].mlp.wi.weight.data.mul_(2)  # unknown to version counters
        plain = model(x, num_output_patches=1).normalised
        with model.folded():
            close(model(x, num_output_patches=1).normalised, plain)
    assert (plain - before).abs().max() > 1e-3


def test_a_single_changed_weight_is_noticed() -> None:
    model, x = small(), series(6)
    with torch.no_grad():
        with model.folded():
            model(x, num_output_patches=1)
        model.encoder.block[0].layer[2].mlp.wo.weight[1, 3] += 5
        plain = model(x, num_output_patches=1).normalised
        with model.folded():
            close(model(x, num_output_patches=1).normalised, plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_used_model_can_be_copied(copied: Callable[[Chronos2], Chronos2]) -> None:
    model, x = small(), series(6)
    with torch.no_grad(), model.folded():
        forecast = model(x, num_output_patches=1).normalised
    other = copied(model)
    with torch.no_grad(), other.folded():
        close(other(x, num_output_patches=1).normalised, forecast)


@pytest.mark.parametrize("patches", [1, 7])
def test_futures_without_covariates_are_projected_once(patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few or many tokens alike, or with covariates, which make them differ: the same forecast."""
    model, x = small(), series(6).nan_to_num()
    for future in (None, torch.randn(6, 8)):
        options: Any = {"num_output_patches": patches, "future_covariates": future}
        with torch.no_grad():
            plain = model(x, **options).normalised
            for share in (0, 1000):
                monkeypatch.setattr(folded, "SHARE_ALIKE", share)
                with model.folded():
                    close(model(x, **options).normalised, plain)


def test_folding_leaves_training_and_adapters_alone() -> None:
    model, x = small(), series(6)
    with model.folded():
        model(x, num_output_patches=1).normalised.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "shared" not in name)


def test_rows_may_stand_in_any_order() -> None:
    model, x, ids = small(), series(6), torch.tensor(IDS["of different sizes"])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        expected = model(x, group_ids=ids, num_output_patches=1).normalised[order]
        close(model(x[order], group_ids=ids[order], num_output_patches=1).normalised, expected)


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("sizes", [[1] * 600, [4] * 150, [2, 3] * 120])
def test_nothing_of_rows_times_rows_is_formed(sizes: list[int]) -> None:
    model = small(context_length=16)
    ids = torch.repeat_interleave(torch.tensor(sizes))
    with torch.no_grad(), _Largest() as seen:
        model(torch.randn(len(ids), 16), group_ids=ids, num_output_patches=1)
    assert seen.elements < len(ids) ** 2
    with torch.no_grad(), backend("reference"), _Largest() as seen:
        model(torch.randn(len(ids), 16), group_ids=ids, num_output_patches=1)
    assert seen.elements >= len(ids) ** 2 or set(sizes) == {1}  # rows alone form no map at all


def test_maps_of_both_attentions_are_captured() -> None:
    model, x = small(), series(6)
    with capture(model) as maps, torch.no_grad():
        model(x, group_ids=torch.tensor(IDS["pairs apart"]), num_output_patches=2)
    over_time = maps["encoder.block.1.layer.0.self_attention"].weights
    over_rows = maps["encoder.block.0.layer.1.self_attention"].weights
    assert over_time.shape == (6, 4, 9, 9)
    close(over_time.sum(-1), torch.ones(6, 4, 9))
    assert over_rows.shape == (9, 4, 6, 6)


# ---- series ------------------------------------------------------------------------------------------------


def test_scaling_a_series_scales_its_forecast() -> None:
    model, x = small(), series(3)
    with torch.no_grad():
        expected = model(x, num_output_patches=2)
        scaled = model(1000 * x, num_output_patches=2)
    close(scaled.normalised, expected.normalised)
    torch.testing.assert_close(scaled.quantiles, 1000 * expected.quantiles, rtol=1e-4, atol=1e-2)


def test_missing_patches_in_front_change_nothing() -> None:
    model, x = small(), series(3, 64)
    longer = torch.cat([torch.full((3, 32), torch.nan), x], 1)
    with torch.no_grad():
        expected = model(x, num_output_patches=2).normalised
        close(model(longer, num_output_patches=2).normalised, expected)


def test_only_the_last_context_length_steps_are_read() -> None:
    model, x = small(), series(3, 200)
    with torch.no_grad():
        expected = model(x[:, -128:], num_output_patches=1).normalised
        close(model(x, num_output_patches=1).normalised, expected)
        mask = torch.ones_like(x).masked_fill(x.isnan(), 0)
        close(model(x, context_mask=mask, num_output_patches=1).normalised, expected)


def test_constant_missing_and_single_values_give_finite_forecasts() -> None:
    x = torch.full((3, 40), torch.nan)
    x[0], x[2, -1] = 5.0, 3.0
    with torch.no_grad():
        result = small()(x, group_ids=torch.zeros(3, dtype=torch.long), num_output_patches=2)
    assert result.quantiles.isfinite().all()
    assert result.loc[:, 0].tolist() == [5.0, 0.0, 3.0]
    torch.testing.assert_close(result.scale[:, 0], torch.tensor([1e-5, 1.0, 1e-5]))


def test_unseen_tokens_change_embeddings_only() -> None:
    torch.manual_seed(1)
    uniform = small()
    torch.manual_seed(1)
    zero = small(unseen="zero")
    x = series(4)
    with torch.no_grad():
        forecasts = [model(x, num_output_patches=2).normalised for model in (uniform, zero)]
        tokens = [model.encode(x).tokens for model in (uniform, zero)]
    close(*forecasts)
    assert (tokens[0] - tokens[1])[1, 0].abs().max() > 1e-2
    close(tokens[0][:, -3:], tokens[1][:, -3:])


def test_steps_of_known_rows_and_missing_targets_do_not_count() -> None:
    model, x = small(), series(3)
    target = torch.randn(3, 30)
    known = torch.full((3, 30), torch.nan)
    known[2] = torch.randn(30)
    with torch.no_grad():
        first = model(x, future_covariates=known, future_target=target, num_output_patches=2).loss
        target[2] += 100
        second = model(x, future_covariates=known, future_target=target, num_output_patches=2).loss
        target[0, 3] = torch.nan
        third = model(x, future_covariates=known, future_target=target, num_output_patches=2).loss
    assert first == second
    assert third < second


def test_queries_and_keys_of_rows_alone_have_zero_gradients() -> None:
    """Every parameter has a gradient, as training on several processes wants."""
    model = small().train()
    loss = model(series(3), num_output_patches=1, future_target=torch.randn(3, 16)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("use_reg_token", [True, False])
def test_every_token_is_there(use_reg_token: bool) -> None:
    model = small(use_reg_token=use_reg_token, patch_size=8, patch_stride=4)
    encoding = model.encode(series(2, 70), num_output_patches=3)
    assert encoding.tokens.shape == (2, 17 + use_reg_token + 3, 32)


# ---- other forms -------------------------------------------------------------------------------------------


def test_compiles_whole() -> None:
    model, x = small(), series(4)
    groups = RowGroups.of(torch.tensor([0, 0, 1, 1]))
    options = {"group_ids": groups, "future_covariates": torch.randn(4, 20), "num_output_patches": 2}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x, **options).normalised, model(x, **options).normalised)


def test_half_precision_is_near() -> None:
    model, x = small(), series(4)
    with torch.no_grad():
        expected = model(x, num_output_patches=2).normalised
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, num_output_patches=2)
        low = model.bfloat16()(x, num_output_patches=2)
    assert mixed.quantiles.dtype == low.quantiles.dtype == torch.float32
    scale = expected.abs().max()
    assert (mixed.normalised.float() - expected).abs().max() < 0.05 * scale
    assert (low.normalised.float() - expected).abs().max() < 0.1 * scale


# ---- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"quantiles": [0.5, 0.1]}, "ascending"),
        ({"unseen": "mean"}, "neither 'uniform' nor 'zero'"),
        ({"d_kv": 7}, "must be even"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": torch.randn(5)}, r"rows and steps \(B, T\)"),
        ({"group_ids": torch.zeros(2, dtype=torch.long)}, "2 group ids for 3 rows"),
        ({"group_ids": torch.zeros(3)}, "integers"),
        ({"context_mask": torch.ones(3, 5)}, r"context_mask has shape \[3, 5\]"),
        ({"future_covariates": torch.randn(3, 17)}, "room for 16"),
        ({"future_covariates": torch.randn(2, 9)}, "3 rows of the context"),
        ({"future_covariates_mask": torch.ones(3, 9)}, "without future_covariates"),
        (
            {"future_covariates": torch.full((3, 4), torch.nan), "future_covariates_mask": torch.ones(3, 4)},
            "counts values that are NaN",
        ),
        ({"num_output_patches": 0}, "not at least 1"),
    ],
)
def test_inputs_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        small()(**({"context": torch.randn(3, 40)} | options))
