"""Group Pose beyond its fixtures: borders, other skeletons, padding, checkpoints, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from domains.detection.keypoints import PoseLoss
from domains.detection.models.common import inverse_sigmoid
from domains.detection.models.group_pose import GroupPose, Proposals
from domains.detection.models.group_pose_layers import cells_of, flatten_maps
from domains.detection.models.multi_scale import projected
from domains.detection.weights.detect import detect
from zoo.attention import capture
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.weights.exchange import load_weights, to_official

CPU = torch.device("cpu")


def small(**options: Any) -> Any:
    """With heads and offsets that let every part have an effect."""
    given: Any = {"num_queries": 6} | options
    model = zoo.create_model("detection/group_pose_mini", **given)
    assert isinstance(model, GroupPose)
    for name, parameter in model.named_parameters():
        if "pose_embed" in name or "sampling_offsets.weight" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def padded_batch() -> tuple[Tensor, Tensor]:
    """Images of 64 x 80 and 50 x 70 pixels, and their mask."""
    mask = torch.zeros(2, 64, 80, dtype=torch.bool)
    mask[1, 50:] = True
    mask[1, :, 70:] = True
    images = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    return images * ~mask[:, None], mask


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---- geometry ----------------------------------------------------------------------------------------------


def test_the_outermost_cells_of_a_large_map_propose_nothing() -> None:
    cells = cells_of([(60, 40)], None, CPU)
    usable = cells.proposable().view(60, 40)
    assert not usable[0].any()
    assert not usable[-1].any()
    assert usable[1:-1].all()


def test_maps_whose_boxes_would_fill_the_image_propose_nothing() -> None:
    shapes = [(2, 2)] * 6
    usable = cells_of(shapes, None, CPU).proposable().view(6, 4)
    assert usable[:5].all()
    assert not usable[5].any()


def test_masks_are_read_at_the_nearest_cell_for_any_size() -> None:
    mask = torch.zeros(1, 75, 101, dtype=torch.bool)
    mask[:, 50:] = True
    mask[:, :, 61:] = True
    shapes = [(10, 13), (5, 7), (3, 4)]
    cells = cells_of(shapes, mask, CPU)
    for (rows, columns), found in zip(shapes, cells.masks, strict=True):
        assert found is not None
        i, j = (torch.arange(n) * full // n for n, full in ((rows, 75), (columns, 101)))
        assert torch.equal(found[0], mask[0][i][:, j])
    assert cells.real is not None
    assert torch.equal(~cells.real, torch.cat([m.flatten(1) for m in cells.masks if m is not None], 1))


def test_references_are_centres_of_the_part_that_is_not_padding() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    cells = cells_of([(4, 4), (2, 2)], mask, CPU)
    close(cells.valid[0], torch.tensor([[0.5, 1.0], [0.5, 1.0]]))
    close(cells.centres[0, :4, 0], torch.tensor([0.25, 0.75, 1.25, 1.75]))
    close(cells.references[0, 0], torch.tensor([[0.125, 0.125], [0.125, 0.125]]))


def test_no_mask_is_a_mask_without_padding() -> None:
    model, (images, _) = small(), padded_batch()
    close(model(images), model(images, torch.zeros(2, 64, 80, dtype=torch.bool)))


def test_what_stands_in_padded_cells_changes_no_other() -> None:
    model, (images, mask) = small(), padded_batch()
    maps = projected(model.input_proj, model.backbone(images))
    cells = cells_of([(m.shape[2], m.shape[3]) for m in maps], mask, CPU)
    x, real = flatten_maps(maps), cells.real
    assert real is not None
    other = torch.where(real[..., None], x, torch.randn_like(x))
    memory, changed = model.encode(x, cells), model.encode(other, cells)
    close(changed[real], memory[real])
    assert not torch.allclose(changed[~real], memory[~real], atol=1e-3)
    close(model.propose(changed, cells), model.propose(memory, cells))


# ---- decoding ----------------------------------------------------------------------------------------------


def decoded(model: Any, order: list[int] | None = None) -> Any:
    images, mask = padded_batch()
    maps = projected(model.input_proj, model.backbone(images))
    cells = cells_of([(m.shape[2], m.shape[3]) for m in maps], mask, CPU)
    memory = model.encode(flatten_maps(maps), cells)
    proposals = model.propose(memory, cells)
    if order is not None:
        proposals = Proposals(*(part[:, order] for part in proposals))
    return model.decode(memory, cells, proposals, auxiliary=True)


def test_permuting_instances_permutes_predictions() -> None:
    model, order = small(), [3, 0, 5, 1, 4, 2]
    before, after = decoded(model), decoded(model, order)
    for key in ("logits", "keypoints"):
        close(after[key], before[key][:, order])
        close(after["auxiliary"][0][key], before["auxiliary"][0][key][:, order])


def test_a_coordinate_is_refined_from_within_a_thousandth_of_the_border() -> None:
    model = small()
    for head in model.pose_embed:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    start = torch.tensor([0.0, 1e-4, 0.5, 1.0]).view(1, 1, 2, 2)
    found = model._refined(0, torch.zeros(1, 1, 3, 64), start)
    close(found.flatten(), torch.tensor([1e-3 / 1.001, 1e-4 / 1.0009, 0.5, 1 / 1.001]), 1e-3)
    assert float(inverse_sigmoid(torch.tensor(0.0), 1e-3).exp()) == pytest.approx(1e-3)


def test_only_auxiliary_keypoints_see_the_position_of_the_next_layer() -> None:
    moved = small()
    plain = small(moved_auxiliary=False)
    plain.load_state_dict(moved.state_dict())
    a, b = decoded(moved), decoded(plain)
    for key in ("logits", "keypoints"):
        close(a[key], b[key])
    close(a["auxiliary"][0]["logits"], b["auxiliary"][0]["logits"])
    assert (a["auxiliary"][0]["keypoints"] - b["auxiliary"][0]["keypoints"]).abs().max() > 1e-3


def test_without_moved_auxiliary_a_layer_predicts_where_the_next_one_starts() -> None:
    model, starts = small(moved_auxiliary=False), []
    model.decoder[1].register_forward_pre_hook(lambda _, args: starts.append(args[2]))
    images, _ = padded_batch()
    out = model(images, auxiliary=True)
    keypoints = starts[0][:, :, 0].unflatten(1, (6, 18))[:, :, 1:]
    close(keypoints, out["auxiliary"][0]["keypoints"])


def test_proposals_and_references_learn_as_in_the_official_program() -> None:
    """The encoder's poses learn from their own loss alone; a layer also from the loss of the next."""
    model = small(dec_layers=3).train()
    images, mask = padded_batch()
    out = model(images, mask)
    last = out["keypoints"].sum()
    parts = [model.enc_pose_embed.layers[0].weight, *(head.layers[0].weight for head in model.pose_embed)]
    grads = torch.autograd.grad(last, parts, allow_unused=True)
    assert [grad is not None for grad in grads] == [False, False, True, True]
    assert torch.autograd.grad(out["proposals"]["keypoints"].sum(), parts[:1])[0].any()


@pytest.mark.parametrize("count", [1, 4, 14])
def test_any_number_of_keypoints(count: int) -> None:
    model, (images, mask) = small(num_keypoints=count), padded_batch()
    out = model(images, mask, auxiliary=True)
    assert out["keypoints"].shape == (2, 6, count, 2)
    assert len(out["auxiliary"]) == 1
    assert all(part.isfinite().all() for part in (out["logits"], out["keypoints"]))


def test_shared_heads_are_one_module() -> None:
    model = small(share_class_head=True, share_pose_head=True)
    assert model.class_embed[0] is model.class_embed[1]
    assert model.pose_embed[0] is model.pose_embed[1]


def test_results_are_the_best_pairs_in_pixels() -> None:
    model = small(num_keypoints=2)
    out: Any = {
        "logits": torch.tensor([[[-1.0, 2.0], [3.0, -5.0], [0.0, 1.0]]]),
        "keypoints": torch.rand(1, 3, 2, 2),
    }
    (found,) = model.postprocess(out, [(100, 200)], k=2)
    close(found["scores"], torch.tensor([3.0, 2.0]).sigmoid())
    assert found["labels"].tolist() == [0, 1]
    close(found["keypoints"], out["keypoints"][0, [1, 0]] * torch.tensor([200.0, 100.0]))
    assert len(model.postprocess(out, [(100, 200)])[0]["scores"]) == 6
    with pytest.raises(DataError, match=r"sizes \(B, 2\)"):
        model.postprocess(out, [(100, 200), (1, 1)])


# ---- running -----------------------------------------------------------------------------------------------


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, (images, mask) = small(dec_layers=1, num_levels=2), padded_batch()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(images, mask), model(images, mask))


def test_bfloat16_autocast_is_close() -> None:
    model = small(num_queries=20)  # all cells of the coarse maps: rounding chooses no other
    exact = decoded(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = decoded(model)
    assert rough["keypoints"].dtype == torch.float32
    ours, theirs = (x["logits"].amax((1, 2)) for x in (rough, exact))
    assert (ours - theirs).abs().max() < 0.2 * theirs.abs().max()


def test_checkpointing_changes_no_gradient() -> None:
    model, (images, mask) = small(dropout=0.0).train(), padded_batch()
    for part in model.backbone.modules():
        part.training = False  # running statistics are not updated twice
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(images, mask)
        parts = (out, *out["auxiliary"], out["proposals"])
        torch.stack([part["keypoints"].sum() for part in parts]).sum().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    close(results[1], results[0])


def test_learns_an_image_by_heart() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("detection/group_pose_mini", num_keypoints=3, num_queries=8).train()
    wanted = {
        "labels": torch.ones(1, dtype=torch.long),
        "keypoints": torch.tensor([[[0.3, 0.3], [0.5, 0.6], [0.7, 0.3]]]),
        "visible": torch.ones(1, 3),
        "area": torch.tensor([0.2]),
    }
    images, loss, losses = torch.randn(1, 3, 64, 64), PoseLoss(3), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(25):
        total, _ = loss(model(images), [wanted])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < losses[0] / 3


def test_a_capture_finds_all_attention() -> None:
    model, (images, mask) = small(dec_layers=1), padded_batch()
    with capture(model) as maps:
        close(model(images, mask), model(images, mask))
    assert [name for name in maps if "#" not in name] == [
        "encoder.0.self_attn",
        "decoder.0.within_attn",
        "decoder.0.across_attn",
        "decoder.0.cross_attn",
    ]
    assert maps["decoder.0.cross_attn"].points.shape == (2, 6 * 18, 4, 3, 4)
    assert maps["decoder.0.across_attn"].weights.shape == (2 * 18, 4, 6, 6)


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_official_names_come_back_with_the_second_names_of_heads() -> None:
    model = small()
    state = to_official(model)
    assert torch.equal(
        state["transformer.decoder.pose_embed.1.layers.0.weight"], model.pose_embed[1].layers[0].weight
    )
    bare = {
        k: v for k, v in state.items() if "decoder.class_embed" not in k and "decoder.pose_embed" not in k
    }
    for given in (state, bare):
        other = small()
        load_weights(other, given)
        images, _ = padded_batch()
        close(other(images), model(images))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("group_pose_r50", {}),
        ("group_pose_swin_t", {}),
        ("group_pose_swin_l", {"num_keypoints": 14}),
    ],
)
def test_files_tell_their_model(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = zoo.create_model(f"detection/{name}", **options)
    assert detect(to_official(model)) == name


def test_a_file_with_other_classes_keeps_all_but_the_heads() -> None:
    model, other = small(), small(num_classes=5)
    with pytest.warns(UserWarning, match="starts anew"):
        load_weights(other, to_official(model))
    close(other.enc_output.weight, model.enc_output.weight)


def test_mistakes_with_files_are_told() -> None:
    state = to_official(small(num_keypoints=14))
    with pytest.raises(CheckpointError, match="num_keypoints=14, not 17"):
        zoo.from_official("group_pose_r50", state, num_body_points=17, nheads=4)
    with pytest.raises(CheckpointError, match="another pre_norm"):
        zoo.from_official("group_pose_r50", state, pre_norm=True)
    with pytest.raises(CheckpointError, match="one temperature"):
        zoo.from_official("group_pose_r50", state, pe_temperatureH=10)
    with pytest.raises(CheckpointError, match="wrong shape"):
        load_weights(small(), state)


def test_mistakes_are_told() -> None:
    with pytest.raises(DataError, match="too few for 500 queries"):
        small(num_queries=500)(torch.randn(1, 3, 64, 64))
    with pytest.raises(DataError, match=r"\(B, 3, H, W\)"):
        small()(torch.randn(1, 1, 64, 64))
    with pytest.raises(ConfigError, match="num_levels=1"):
        small(num_levels=1)
    with pytest.raises(ConfigError, match="do not divide 48"):
        small(embed_dim=48)
    with pytest.raises(ConfigError, match="num_keypoints is at least 1"):
        small(num_keypoints=0)
