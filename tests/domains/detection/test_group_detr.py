"""Group DETR: groups, symmetries, padding, what evaluation leaves out, sizes, messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detr_small import images, small_detr, targets
from torch import Tensor, nn

import zoo
from domains.detection.boxes import to_corners
from domains.detection.losses import box_terms
from domains.detection.matching import SetLoss
from domains.detection.models.common import (
    MLP,
    ImageBatch,
    inverse_sigmoid,
    resized_mask,
    sine_embedding,
    sine_position,
)
from domains.detection.models.detector import Outputs, layers
from domains.detection.models.group_detr import GroupDETR
from zoo.attention import backend, capture
from zoo.errors import ConfigError, DataError


def _batch() -> ImageBatch:
    return ImageBatch.pad(images((64, 48), (48, 96)))


def _close(a: Outputs, b: Outputs, tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(layers(a), layers(b), strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance)


def _permuted(model: GroupDETR, order: Tensor) -> None:
    with torch.no_grad():
        model.query_embed.weight.copy_(model.query_embed.weight[order])


# ---- groups ------------------------------------------------------------------------------------------------


def test_groups_in_training_are_passes_of_their_own_with_shared_weights() -> None:
    model, batch = small_detr(), _batch()
    together = model.train()(batch.images, batch.mask)
    queries = model.query_embed.weight.detach().clone()
    for group in range(model.groups):
        alone = small_detr(groups=1)
        state = model.state_dict()
        state["query_embed.weight"] = queries[group * 4 : group * 4 + 4]
        alone.load_state_dict(state)
        separate = alone.train()(batch.images, batch.mask)
        for ours, theirs in zip(layers(together), layers(separate), strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(
                    ours[name][:, group * 4 : group * 4 + 4], value, rtol=1e-4, atol=1e-5
                )


def test_evaluation_is_the_first_group_of_training() -> None:
    """And so is the self-attention of nothing, which evaluation leaves out."""
    model, batch = small_detr(), _batch()
    evaluated = model(batch.images, batch.mask, auxiliary=True)
    assert model.active_groups == 1
    trained = model.train()(batch.images, batch.mask)
    assert model.active_groups == 3
    for ours, theirs in zip(layers(evaluated), layers(trained), strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name][:, :4], rtol=1e-4, atol=1e-5)


def test_the_loss_of_groups_is_the_mean_of_the_groups() -> None:
    model, batch, wanted = small_detr().train(), _batch(), targets(3, 2)
    outputs = layers(model(batch.images, batch.mask))
    loss = SetLoss(box_terms())
    parts = [{name: x[:, i : i + 4] for name, x in out.items()} for i in (0, 4, 8) for out in outputs]
    each = [loss(parts[i : i + 2], wanted)[0] for i in (0, 2, 4)]
    torch.testing.assert_close(loss(outputs, wanted, 3)[0], torch.stack(each).mean())


def test_every_parameter_that_can_learn_does() -> None:
    model, batch = small_detr().train(), _batch()
    SetLoss(box_terms())(layers(model(batch.images, batch.mask)), targets(3, 2), 3)[0].backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert not silent
    first: Any = model.decoder.layers[0]
    assert not first.self_attention.content.weight.grad.any()  # there is no content yet


def test_permuting_queries_permutes_predictions() -> None:
    model, batch = small_detr(), _batch()
    order = torch.tensor([2, 0, 3, 1])
    before = model(batch.images, batch.mask)
    _permuted(model, torch.cat([order, torch.arange(4, 12)]))
    after = model(batch.images, batch.mask)
    for name in ("logits", "boxes"):
        torch.testing.assert_close(after[name], before[name][:, order], rtol=1e-4, atol=1e-5)


def test_permuting_groups_permutes_predictions_in_training() -> None:
    model, batch = small_detr().train(), _batch()
    order = torch.cat([torch.arange(8, 12), torch.arange(0, 8)])
    before = model(batch.images, batch.mask)
    _permuted(model, order)
    torch.testing.assert_close(model(batch.images, batch.mask)["logits"], before["logits"][:, order])


# ---- padding -----------------------------------------------------------------------------------------------


def test_what_stands_in_padded_cells_changes_nothing() -> None:
    model, batch = small_detr(), _batch()
    assert batch.mask is not None
    (features,) = model.backbone(batch.images)
    padded = resized_mask(batch.mask, features.shape[-2:])
    other = torch.where(padded[:, None], 100 * torch.randn_like(features), features)
    _close(model.detect(features, batch.mask), model.detect(other, batch.mask))


def test_padded_cells_can_be_cut_off() -> None:
    model, batch = small_detr(), ImageBatch.pad(images((64, 48), (64, 96)))
    (features,) = model.backbone(batch.images)
    whole, cut = model.detect(features, batch.mask), model.detect(features[:1, :, :, :3])
    torch.testing.assert_close(whole["boxes"][:1], cut["boxes"], rtol=1e-4, atol=1e-5)


def test_a_mask_without_padding_is_no_mask() -> None:
    model, x = small_detr(), torch.randn(2, 3, 64, 48)
    _close(model(x), model(x, torch.zeros(2, 64, 48, dtype=torch.bool)))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, x = small_detr(), torch.randn(3, 3, 64, 48)
    torch.testing.assert_close(model(x)["boxes"][1:2], model(x[1:2])["boxes"], rtol=1e-4, atol=1e-5)


def test_pad_stacks_images_of_several_sizes() -> None:
    small, large = images((5, 7), (6, 4))
    batch = ImageBatch.pad([small, large], divisor=4)
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.sizes.tolist() == [[5, 7], [6, 4]]
    assert batch.mask is not None
    assert torch.equal(batch.images[0, :, :5, :7], small)
    assert not batch.images[0, :, 5:].any()
    assert (~batch.mask).sum((1, 2)).tolist() == [35, 24]
    assert ImageBatch.pad([small, small]).mask is None
    with pytest.raises(DataError, match=r"Image 1 of the batch is \(1, 5, 7\)"):
        ImageBatch.pad([small, small[:1]])


# ---- parts -------------------------------------------------------------------------------------------------


def test_mask_of_a_map_is_that_of_the_nearest_pixel() -> None:
    mask = torch.rand(2, 37, 50) > 0.5
    rows, columns = torch.arange(9) * 37 // 9, torch.arange(13) * 50 // 13
    assert torch.equal(resized_mask(mask, (9, 13)), mask[:, rows][:, :, columns])


def test_sine_position_by_its_definition() -> None:
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[:, 2:], mask[:, :, 3:] = True, True
    found = sine_position((3, 4), mask, 8, temperature=20.0)
    for row, column in ((0, 0), (1, 2)):
        expected = []
        for count, total in ((row + 1, 2), (column + 1, 3)):
            angle = count / (total + 1e-6) * 2 * math.pi
            for i in range(4):
                wave = math.cos if i % 2 else math.sin
                expected.append(wave(angle / 20 ** (2 * (i // 2) / 4)))
        torch.testing.assert_close(found[0, row, column], torch.tensor(expected))


def test_sine_embedding_has_y_before_x() -> None:
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    parts = [sine_embedding(box[[i, i]], 6)[:6] for i in (1, 0, 2, 3)]
    torch.testing.assert_close(sine_embedding(box, 6), torch.cat(parts))
    torch.testing.assert_close(sine_embedding(box[:2], 6), torch.cat(parts[:2]))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_inverse_sigmoid_ends_at_its_eps(eps: float) -> None:
    x = torch.tensor([-1.0, 0.0, eps / 2, 0.25, 1 - eps / 2, 1.0, 2.0])
    top = math.log(1 / eps)
    expected = torch.tensor([-top, -top, math.log(eps / (1 - eps / 2)), math.log(1 / 3), 0, top, top])
    expected[4] = -expected[2]
    torch.testing.assert_close(inverse_sigmoid(x, eps), expected, rtol=1e-3, atol=1e-6)


def test_mlp_has_relu_between_its_layers() -> None:
    mlp, x = MLP(3, 5, 2, 3), torch.randn(4, 3)
    a, b, c = (layer for layer in mlp.layers if isinstance(layer, nn.Linear))
    torch.testing.assert_close(mlp(x), c(F.relu(b(F.relu(a(x))))))


def test_postprocess_takes_the_best_pairs_of_query_and_class() -> None:
    model = small_detr()
    logits, boxes = torch.randn(2, 4, 5), torch.rand(2, 4, 4)
    found = model.postprocess({"logits": logits, "boxes": boxes, "auxiliary": []}, [[10, 20], [30, 40]], k=7)
    assert len(found) == 2
    for i, (height, width) in enumerate(((10, 20), (30, 40))):
        pairs = sorted(((float(logits[i, q, c]), q, c) for q in range(4) for c in range(5)), reverse=True)[:7]
        assert found[i]["labels"].tolist() == [c for _, _, c in pairs]
        torch.testing.assert_close(found[i]["scores"], torch.tensor([s for s, _, _ in pairs]).sigmoid())
        corners = to_corners(boxes[i]) * torch.tensor([width, height, width, height])
        torch.testing.assert_close(found[i]["boxes"], corners[[q for _, q, _ in pairs]])
    assert len(model.postprocess(model(torch.randn(1, 3, 64, 64)), [[64, 64]])[0]["scores"]) == 4 * 5


# ---- ways to run -------------------------------------------------------------------------------------------


def test_backends_agree_and_maps_are_recorded() -> None:
    model, batch = small_detr().train(), _batch()
    with backend("reference"):
        expected = model(batch.images, batch.mask)
    with capture(model) as maps:
        _close(model(batch.images, batch.mask), expected)
    tokens = 4 * 6
    assert {name: found.sizes for name, found in maps.items()} == {
        "encoder.0.attention": (2, 4, tokens, tokens),
        "decoder.layers.0.self_attention": (2, 4, 12, 12),
        "decoder.layers.0.cross_attention": (2, 4, 12, tokens),
        "decoder.layers.1.self_attention": (2, 4, 12, 12),
        "decoder.layers.1.cross_attention": (2, 4, 12, tokens),
    }
    groups = torch.arange(12) // 4
    apart = groups[:, None] != groups
    assert not maps["decoder.layers.1.self_attention"].weights[..., apart].any()


def test_bfloat16_autocast_gives_float32_predictions_near_those_of_float32() -> None:
    model, batch = small_detr(), _batch()
    expected = model(batch.images, batch.mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch.images, batch.mask)
    assert found["boxes"].dtype == found["logits"].dtype == torch.float32
    _close(found, expected, 0.1)


def test_double_precision_is_kept() -> None:
    """Up to the position encoding of the map, which is float32."""
    model, x = small_detr(), torch.randn(1, 3, 64, 64)
    expected, found = model(x), model.double()(x.double())
    assert found["boxes"].dtype == found["logits"].dtype == torch.float64
    torch.testing.assert_close(found["boxes"].float(), expected["boxes"], rtol=1e-4, atol=1e-5)


def test_transformer_compiles_in_one_graph() -> None:
    model, batch = small_detr(enc_layers=0, dec_layers=1), _batch()
    (features,) = model.backbone(batch.images)
    compiled = torch.compile(model.detect, fullgraph=True, backend="eager")
    _close(compiled(features, batch.mask), model.detect(features, batch.mask))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_in_one_graph(training: bool) -> None:
    model, batch = small_detr(), _batch()
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    _close(compiled(batch.images, batch.mask), model(batch.images, batch.mask))


def test_checkpointing_changes_no_gradient() -> None:
    model, batch, wanted = small_detr().train(), _batch(), targets(3, 2)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        SetLoss(box_terms())(layers(model(batch.images, batch.mask)), wanted, 3)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_dropout_acts_in_training_alone() -> None:
    model, x = small_detr(dropout=0.5), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x)["logits"], model(x)["logits"])
    model.train()
    assert not torch.equal(model(x)["logits"], model(x)["logits"])


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_fused_copy_gives_the_same(backbone: str) -> None:
    model, x = small_detr(backbone=backbone), torch.randn(1, 3, 64, 64)
    for key, buffer in model.backbone.named_buffers():
        nn.init.uniform_(buffer, 0.5, 1.0) if key.endswith(("weight", "var")) else nn.init.normal_(buffer)
    fused = model.fuse()
    assert not list(fused.backbone.buffers())
    assert list(model.backbone.buffers())
    _close(fused(x), model(x), 1e-4)


def test_a_step_of_training_lowers_the_loss() -> None:
    model, batch, wanted = small_detr().train(), _batch(), targets(3, 2)
    optimizer, loss = torch.optim.AdamW(model.parameters(), 1e-3), SetLoss(box_terms())
    values = []
    for _ in range(8):
        total, _ = loss(layers(model(batch.images, batch.mask)), wanted, 3)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(float(total.detach()))
    assert values[-1] < 0.8 * values[0]


def test_own_weights_round_trip(tmp_path: Any) -> None:
    model, x = small_detr(position="learned"), torch.randn(1, 3, 64, 64)
    zoo.save_model(model, tmp_path / "model.safetensors")
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    _close(loaded.eval()(x), model(x))


def test_published_sizes() -> None:
    counts = {name: zoo.model_card(name).parameters for name in ("group_detr_r50", "conditional_detr_r50")}
    assert {name: round((count or 0) / 1e6, 1) for name, count in counts.items()} == {
        "group_detr_r50": 44.2,
        "conditional_detr_r50": 43.4,
    }
    with torch.device("meta"):
        dilated: Any = zoo.create_model("detection/group_detr_r101_dc5")
    assert dilated.backbone.strides == (16,)


# ---- what is wrong is named --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 30, "num_heads": 3}, "width divisible by 4, not 30"),
        ({"num_heads": 5}, "32 is not divisible by 5 heads"),
        ({"groups": 0}, "groups is at least 1, not 0"),
        ({"position": "rotary"}, "sine or learned, not 'rotary'"),
        ({"backbone": "resnet18", "dilation": True}, "basic blocks"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_detr(**options)


def test_images_and_masks_that_do_not_fit() -> None:
    model = small_detr()
    with pytest.raises(DataError, match=r"Images are \(B, 3, H, W\), not \(1, 4, 64, 64\)"):
        model(torch.zeros(1, 4, 64, 64))
    with pytest.raises(DataError, match=r"is bool \(1, 64, 64\), True = padding"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64))
    with pytest.raises(DataError, match="up to 50 x 50 cells, not 4 x 60"):
        small_detr(position="learned")(torch.zeros(1, 3, 64, 960))
    with pytest.raises(DataError, match=r"1 images have sizes \(B, 2\), not \(2, 2\)"):
        model.postprocess(model(torch.zeros(1, 3, 64, 64)), [[1, 1], [2, 2]])
