"""NCPP: shapes, what its parts see, backends, compilation and the official names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from domains.forecasting.models.ncpp import NCPP, FeatureAttention, SameConv, TextTrunk
from zoo.attention import backend, capture
from zoo.errors import ConfigError, DataError
from zoo.weights.exchange import load_weights

NUMERIC = {"memory": 2, "accelerator": 5}
TEXT = {"system_text": [3, 4], "workload_text": [6]}


def tiny(**options: Any) -> NCPP:
    chosen = {"numeric": NUMERIC, "text": TEXT, "width": 4, "num_targets": 3, "vocabulary": 20} | options
    model = zoo.create_model("forecasting/ncpp", **chosen)
    assert isinstance(model, NCPP)
    return model.eval()


def inputs(rows: int = 5, numbers: int = 7, characters: int = 13) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, numbers), torch.randint(0, 20, (rows, characters))


@pytest.mark.parametrize(
    ("numeric", "text"),
    [(NUMERIC, TEXT), (NUMERIC, {}), ({}, TEXT), ({"only": 1}, {"t": [1]}), ({"a": 1, "b": 1, "c": 9}, {})],
)
@pytest.mark.parametrize("cross_group", [False, True])
def test_any_groups_give_scores_and_every_weight_a_gradient(
    numeric: Any, text: Any, cross_group: bool
) -> None:
    model = tiny(numeric=numeric, text=text, cross_group=cross_group).train()
    counts = sum(numeric.values()), sum(map(sum, text.values()))
    scores = model(*inputs(4, *counts))
    assert scores.shape == (4, 3)
    scores.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_the_card_counts_the_published_size() -> None:
    """5,674,465 with the running statistics, as Keras counts; those are 3 x (8 x 64 + 16 x 128)."""
    card = zoo.model_card("forecasting/ncpp")
    assert card.parameters == 5_674_465 - 3 * (4 * 2 * 64 + 8 * 2 * 128)


def test_a_row_does_not_depend_on_the_others_of_its_batch() -> None:
    model, (numbers, codes) = tiny(), inputs()
    torch.testing.assert_close(model(numbers, codes)[2:3], model(numbers[2:3], codes[2:3]))


def test_even_kernels_are_padded_by_one_less_on_the_left() -> None:
    conv = SameConv(1, 1, 1, 8)
    nn.init.zeros_(conv.conv.bias)  # pyright: ignore[reportArgumentType]
    impulse = torch.zeros(1, 1, 20)
    impulse[0, 0, 10] = 1
    seen = conv(impulse)[0, 0].nonzero().flatten().tolist()
    assert (seen[0], seen[-1]) == (6, 13)
    torch.testing.assert_close(conv(impulse)[0, 0, 6:14], conv.conv.weight[0, 0].flip(0))


def test_padding_is_a_character_like_any_other() -> None:
    trunk = TextTrunk([4], vocabulary=9, embed_dims=4, width=2, momentum=0.1).eval()
    codes = torch.tensor([[3, 5, 0, 0]])
    before = trunk(codes)
    with torch.no_grad():
        trunk.embed.weight[0] += 1
    assert not torch.allclose(before, trunk(codes))


def test_attention_does_not_see_the_order_of_features_but_the_trunk_does() -> None:
    block, order = FeatureAttention(8, 2), torch.tensor([3, 0, 2, 1])
    features = torch.randn(2, 4, 8)
    torch.testing.assert_close(block(features)[:, order], block(features[:, order]))
    model = tiny(numeric={"memory": 4}, text={})
    numbers, codes = inputs(2, 4, 0)
    assert not torch.allclose(model(numbers, codes), model(numbers[:, order], codes))


def test_weights_are_divided_by_the_published_scale() -> None:
    model, (numbers, codes) = tiny(), inputs()
    with capture(model, scores=True) as maps:
        model(numbers, codes)
    assert sorted(maps) == ["numeric_attention.0", "numeric_attention.1", "text_attention"]
    block = model.numeric_attention[1]
    features = model.numeric_trunk(numbers[:, None]).transpose(1, 2)[:, 2:]  # pyright: ignore
    q, k, _ = block.qkv(block.norm(features)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # pyright: ignore
    expected = (q @ k.mT / (8 * 8 * 2)).softmax(-1)
    torch.testing.assert_close(maps["numeric_attention.1"].weights, expected)


def test_scores_are_a_sum_over_texts_and_numbers() -> None:
    """As published, nothing that depends on both can be learnt: see the module's docstring."""
    model = tiny()
    (a, s), (b, t) = inputs(), inputs()
    torch.testing.assert_close(model(a, s) + model(b, t), model(a, t) + model(b, s))


def test_backends_agree() -> None:
    model, given = tiny(), inputs()
    with backend("reference"):
        expected = model(*given)
    torch.testing.assert_close(model(*given), expected)


def test_half_precision_is_close() -> None:
    model, given = tiny(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(*given)
    torch.testing.assert_close(scores.float(), model(*given), atol=0.05, rtol=0.05)


def test_the_model_compiles_in_one_graph() -> None:
    model, given = tiny(width=2), inputs(3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), model(*given))


def test_official_names_there_and_back() -> None:
    model = tiny(numeric={"memory": 2, "processor": 3, "system": 1}, cross_group=True)
    official = zoo.to_official(model)
    assert {"resnet.num.fix_convx1.weight", "attn.cpu_num.out.weight", "embed.Workload_info.weight"} <= set(
        official
    )
    rebuilt = tiny(numeric={"memory": 2, "processor": 3, "system": 1}, cross_group=True)
    load_weights(rebuilt, official)
    given = inputs(3, 6)
    torch.testing.assert_close(rebuilt(*given), model(*given), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numeric": {}, "text": {}}, "at least one group"),
        ({"numeric": {"memory": 0}}, r"numeric.memory=0"),
        ({"text": {"system_text": [3, 0]}}, r"text.system_text=\[3, 0\]"),
    ],
)
def test_groups_without_anything_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_other_widths_of_the_input_are_refused() -> None:
    with pytest.raises(DataError, match=r"numbers \(B, 7\) and codes \(B, 13\), not for \(2, 6\)"):
        tiny()(*inputs(2, 6))
