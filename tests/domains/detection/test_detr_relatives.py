"""Groups of queries on other decoders: DAB-DETR and two-stage Deformable DETR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detr_small import FROZEN, images, lively, targets
from torch import Tensor

import zoo
from domains.detection.losses import box_terms
from domains.detection.matching import SetLoss
from domains.detection.models.common import ImageBatch
from domains.detection.models.detector import layers
from domains.detection.models.group_dab import GroupDAB
from domains.detection.models.group_deformable import proposed_boxes
from domains.detection.models.group_pose_layers import cells_of
from zoo.attention import backend, capture
from zoo.errors import ConfigError, DataError

FAMILIES = ("group_dab_mini", "group_deformable_mini")
each = pytest.mark.parametrize("name", FAMILIES)


def _small(name: str, **options: Any) -> Any:
    given = {"num_classes": 5, "num_queries": 4, "groups": 3, "embed_dim": 32, "backbone_options": FROZEN}
    return lively(zoo.create_model(f"detection/{name}", **(given | options))).eval()


def _batch() -> ImageBatch:
    return ImageBatch.pad(images((64, 48), (48, 96)))


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], rows: slice = slice(None)) -> None:
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name][:, rows], rtol=1e-4, atol=1e-5)


@each
def test_evaluation_is_the_first_group_of_training(name: str) -> None:
    model, batch = _small(name), _batch()
    evaluated = layers(model(batch.images, batch.mask, auxiliary=True))
    trained = layers(model.train()(batch.images, batch.mask))
    for ours, theirs in zip(evaluated, trained, strict=True):
        assert (ours["boxes"].shape, theirs["boxes"].shape) == ((2, 4, 4), (2, 12, 4))
        _equal(ours, theirs, slice(0, 4))


@each
def test_groups_do_not_see_each_other(name: str) -> None:
    """What a group computes stays when the others get other queries and heads."""
    model, batch = _small(name).train(), _batch()
    before = layers(model(batch.images, batch.mask))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in ("anchor_embed.weight", "query_embed.weight"):
                parameter[4:].add_(torch.randn_like(parameter[4:]))
            if key.startswith(("proposal_heads.1", "proposal_heads.2")):
                parameter.add_(torch.randn_like(parameter))
    after = layers(model(batch.images, batch.mask))
    for ours, theirs in zip(after, before, strict=True):
        _equal({key: value[:, :4] for key, value in ours.items()}, theirs, slice(0, 4))
        assert not torch.allclose(ours["boxes"][:, 4:], theirs["boxes"][:, 4:], atol=1e-3)


@each
def test_every_parameter_learns_and_the_loss_falls(name: str) -> None:
    model, batch, wanted = _small(name).train(), _batch(), targets(3, 2)
    optimizer, loss, values = torch.optim.AdamW(model.parameters(), 1e-3), SetLoss(box_terms()), []
    for _ in range(8):
        total, _ = loss(layers(model(batch.images, batch.mask)), wanted, model.active_groups)
        optimizer.zero_grad()
        total.backward()
        assert not [key for key, p in model.named_parameters() if p.grad is None]
        optimizer.step()
        values.append(float(total.detach()))
    assert values[-1] < 0.9 * values[0]


@each
def test_backends_and_half_precision_agree_and_maps_are_recorded(name: str) -> None:
    model, batch = _small(name), _batch()
    with backend("reference"):
        expected = layers(model(batch.images, batch.mask))[-1]
    with capture(model) as maps:
        _equal(layers(model(batch.images, batch.mask))[-1], expected)
    assert sum("decoder" in key for key in maps) >= 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layers(model(batch.images))[-1]
    assert found["boxes"].dtype == torch.float32
    assert bool(found["boxes"].isfinite().all())


@each
def test_own_weights_round_trip_and_results_are_pixels(name: str, tmp_path: Any) -> None:
    model, x = _small(name), torch.randn(1, 3, 64, 96)
    zoo.save_model(model, tmp_path / "model.safetensors")
    loaded: Any = zoo.load_model(tmp_path / "model.safetensors")[0].eval()
    outputs = model(x)
    _equal(layers(loaded(x))[-1], layers(outputs)[-1])
    (found,) = model.postprocess(outputs, [[64, 96]])
    assert found["boxes"].shape == (20, 4)
    assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()


@each
def test_compiles_in_one_graph(name: str) -> None:
    model, batch = _small(name), _batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    _equal(layers(compiled(batch.images, batch.mask))[-1], layers(model(batch.images, batch.mask))[-1])


# ---- DAB ---------------------------------------------------------------------------------------------------


def test_a_layer_moves_the_boxes_of_the_one_before() -> None:
    """With heads that say nothing, boxes stay the anchors; a constant shift adds up over the layers."""
    model, x = _small("group_dab_mini", dec_layers=3), torch.randn(1, 3, 64, 64)
    assert isinstance(model, GroupDAB)
    last: Any = model.bbox_embed.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(0.25)
        model.anchor_embed.weight.clamp_(-3, 3)
    anchors = model.anchor_embed.weight[None, :4]
    for i, found in enumerate(layers(model(x, auxiliary=True))):
        torch.testing.assert_close(found["boxes"], (anchors + 0.25 * (i + 1)).sigmoid(), rtol=1e-4, atol=1e-5)


def test_permuting_anchors_permutes_predictions() -> None:
    model, batch = _small("group_dab_mini"), _batch()
    order = torch.tensor([2, 0, 3, 1])
    before = layers(model(batch.images, batch.mask))[-1]
    with torch.no_grad():
        model.anchor_embed.weight[:4] = model.anchor_embed.weight[order]
    after = layers(model(batch.images, batch.mask))[-1]
    _equal(after, {key: value[:, order] for key, value in before.items()})


# ---- deformable --------------------------------------------------------------------------------------------


def test_proposals_are_squares_around_cells() -> None:
    mask = torch.zeros(1, 32, 64, dtype=torch.bool)
    mask[:, :, 48:] = True
    found = proposed_boxes(cells_of([(4, 8), (2, 4)], mask, mask.device)).sigmoid()
    torch.testing.assert_close(found[0, 0], torch.tensor([0.5 / 6, 0.5 / 4, 0.05, 0.05]))
    torch.testing.assert_close(found[0, 32 + 5], torch.tensor([1.5 / 3, 1.5 / 2, 0.1, 0.1]))
    assert bool(proposed_boxes(cells_of([(4, 8)], mask, mask.device)).isfinite().all())


def test_padded_cells_propose_nothing() -> None:
    model, batch = _small("group_deformable_mini", num_queries=4), _batch()
    proposals = layers(model(batch.images, batch.mask, auxiliary=True))[0]
    assert proposals["boxes"].shape == (2, 4, 4)
    with pytest.raises(DataError, match="42 cells in all, too few for 43 queries"):
        _small("group_deformable_mini", num_queries=43)(torch.randn(1, 3, 32, 64))


@pytest.mark.parametrize("options", [{"embed_dim": 48}, {"num_levels": 1}, {"dec_layers": 0}])
def test_sizes_that_do_not_fit(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        _small("group_deformable_mini", **options)
