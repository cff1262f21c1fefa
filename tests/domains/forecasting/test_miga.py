"""MIGA: its gate, its groups of experts, its backbones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domains.forecasting.models.miga import GRU, MIGA, Gate
from zoo.attention import capture
from zoo.create import create_model
from zoo.errors import ConfigError
from zoo.registry import get_domain, list_models, model_card

BACKBONES = ("gru", "conv", "attention")
SIZES: dict[str, Any] = {
    "hidden": 12,
    "window": 6,
    "num_groups": 3,
    "group_size": 4,
    "top_k": 5,
    "expert_dim": 8,
    "num_heads": 2,
}


def small(**options: Any) -> MIGA:
    return MIGA(5, **(SIZES | options)).eval()


def days(stocks: int = 7, count: int = 2) -> Tensor:
    return torch.randn(count, stocks, 6, 5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_permutation_of_stocks_permutes_the_scores(backbone: str) -> None:
    model, x, order = small(backbone=backbone), days(), torch.randperm(7)
    torch.testing.assert_close(model(x[:, order]).scores, model(x).scores[:, order])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_changes_neither_scores_nor_balance(backbone: str) -> None:
    model, x = small(backbone=backbone), days()
    mask = torch.ones(2, 7, dtype=torch.bool)
    padded = torch.cat([x, 9 * torch.randn(2, 3, 6, 5)], dim=1)
    out, alone = model(padded, nn.functional.pad(mask, (0, 3))), model(x)
    torch.testing.assert_close(out.scores[:, :7], alone.scores)
    torch.testing.assert_close(out.balance, alone.balance)


def test_a_permutation_of_experts_inside_a_group_changes_nothing() -> None:
    model, x = small(), days()
    before = model(x)
    group, order = slice(4, 8), 4 + torch.randperm(4)
    with torch.no_grad():
        for layer, width in ((model.gate.logits, 1), (model.experts, SIZES["expert_dim"])):
            for parameter in layer.parameters():
                rows = parameter.view(-1, width, *parameter.shape[1:])
                rows[group] = rows[order].clone()
    after = model(x)
    torch.testing.assert_close(after.scores, before.scores)
    torch.testing.assert_close(after.gates[..., group], before.gates[..., order])


def test_experts_of_a_group_exchange_information_and_others_do_not() -> None:
    model, x = small(), torch.randn(1, 12, SIZES["expert_dim"])
    changed = x.clone()
    changed[:, 4] += torch.randn(SIZES["expert_dim"])
    moved = (model.attention(changed) - model.attention(x)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [4 <= i < 8 for i in range(12)]


def test_the_experts_attend_through_the_core() -> None:
    model, x = small(), days()
    with capture(model) as maps:
        model(x)
    assert list(maps) == ["attention"]
    inside = torch.block_diag(*[torch.ones(4, 4)] * 3) > 0
    assert (maps["attention"].weights.amax((0, 1)) > 0).equal(inside)


@pytest.mark.parametrize("top_k", [1, 5, 12])
def test_exactly_k_experts_have_weight_and_it_adds_up_to_one(top_k: int) -> None:
    gates = small(top_k=top_k)(days()).gates
    assert (gates > 0).sum(-1).eq(top_k).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 7))


def test_equal_logits_still_choose_k() -> None:
    gate = Gate(3, 8, 2)
    nn.init.zeros_(gate.logits.weight)
    nn.init.zeros_(gate.logits.bias)
    weights, balance = gate(torch.randn(5, 3))
    assert (weights > 0).sum(-1).eq(2).all()
    assert float(balance.detach()) == pytest.approx(1)


def test_the_balance_is_one_of_even_use_and_the_number_of_experts_of_a_single_one() -> None:
    gate = Gate(4, 4, 1)
    with torch.no_grad():
        gate.logits.weight.copy_(40 * torch.eye(4))
        gate.logits.bias.zero_()
    even, alone = torch.eye(4), torch.eye(4)[:1].expand(4, -1)
    assert float(gate(even)[1].detach()) == pytest.approx(1, abs=1e-4)
    assert float(gate(alone)[1].detach()) == pytest.approx(4, abs=1e-4)


def test_the_balance_drives_the_gate_towards_even_use() -> None:
    gate, h = Gate(4, 6, 2), torch.randn(64, 4)
    optimiser = torch.optim.Adam(gate.parameters(), lr=0.05)
    first = float(gate(h)[1].detach())
    for _ in range(60):
        optimiser.zero_grad()
        gate(h)[1].backward()
        optimiser.step()
    assert float(gate(h)[1].detach()) < first


def test_the_written_out_gru_is_that_of_torch() -> None:
    ours, theirs = GRU(5, 12), nn.GRU(5, 12, batch_first=True)
    theirs.load_state_dict(
        {
            "weight_ih_l0": ours.input.weight,
            "bias_ih_l0": ours.input.bias,
            "weight_hh_l0": ours.state.weight,
            "bias_hh_l0": ours.state.bias,
        }
    )
    x = torch.randn(3, 9, 5)
    torch.testing.assert_close(ours(x), theirs(x)[0][:, -1])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_compiles_without_graph_breaks(backbone: str) -> None:
    model, x = small(backbone=backbone), days()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, None).scores, model(x).scores)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_has_a_gradient(backbone: str) -> None:
    model = small(backbone=backbone, top_k=12).train()
    out = model(days())
    (out.scores.square().sum() + out.balance).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_it_works_under_autocast() -> None:
    model, x = small(), days()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x).scores
    torch.testing.assert_close(low.float(), model(x).scores, atol=0.05, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 13}, "top_k=13: 1 to 12 of 3 groups of 4"),
        ({"num_heads": 3}, "not divisible by 3 heads"),
        ({"backbone": "lstm"}, "backbone=lstm is none of gru, conv, attention"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_the_published_size_and_its_card() -> None:
    assert {"miga", "gru_ranker"} <= set(list_models("forecasting/*"))
    model: Any = create_model("miga", num_features=34)
    assert (model.gate.logits.out_features, model.gate.top_k) == (63, 8)
    card = model_card("miga")
    assert (card.domain, card.problem, card.status) == ("forecasting", "ranking", "re-implementation")
    assert card.parameters == sum(p.numel() for p in model.parameters())
    assert get_domain("forecasting", "miga") is get_domain("forecasting/ranking")
