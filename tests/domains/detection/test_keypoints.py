"""Skeletons, the object keypoint similarity, and the loss of poses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from domains.detection.keypoints import (
    COCO,
    CROWDPOSE,
    UNIFORM_SIGMA,
    PoseLoss,
    Skeleton,
    default_skeleton,
    keypoint_distance,
    mirrored,
    oks,
    skeleton,
)
from zoo.errors import ConfigError, DataError


@pytest.mark.parametrize("kind", [COCO, CROWDPOSE])
def test_pairs_are_left_and_right_of_one_part(kind: Skeleton) -> None:
    for a, b in kind.pairs:
        assert kind.names[a].removeprefix("left_") == kind.names[b].removeprefix("right_")
        assert kind.sigmas[a] == kind.sigmas[b]
    sided = [name for name in kind.names if name.startswith(("left_", "right_"))]
    assert len(sided) == 2 * len(kind.pairs)


@pytest.mark.parametrize("kind", [COCO, CROWDPOSE])
def test_links_join_all_keypoints(kind: Skeleton) -> None:
    reached = {0}
    for _ in kind.names:
        reached |= {end for link in kind.links if reached & set(link) for end in link}
    assert reached == set(range(len(kind.names)))


def test_coco_has_the_sigmas_of_its_evaluation() -> None:
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    assert list(COCO.sigmas) == pytest.approx(evaluation.Params("keypoints").kpt_oks_sigmas.tolist())


def test_a_number_of_keypoints_finds_its_skeleton() -> None:
    assert default_skeleton(17) is COCO
    assert default_skeleton(14) is CROWDPOSE
    assert default_skeleton(5).sigmas == (UNIFORM_SIGMA,) * 5
    assert skeleton(5).mirror == (0, 1, 2, 3, 4)
    assert skeleton("coco") is COCO


def test_mistakes_in_skeletons_are_told() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'coco'"):
        skeleton("cocoa")
    with pytest.raises(ConfigError, match="one sigma above zero"):
        Skeleton(("a", "b"), (0.1,))
    with pytest.raises(ConfigError, match="one sigma above zero"):
        skeleton(0)
    with pytest.raises(ConfigError, match="does not join two"):
        Skeleton(("a", "b"), (0.1, 0.1), links=((0, 2),))
    with pytest.raises(ConfigError, match="two of the pairs"):
        Skeleton(("a", "b", "c"), (0.1,) * 3, pairs=((0, 1), (1, 2)))


def test_a_mirror_image_swaps_sides_and_twice_is_none() -> None:
    points = torch.rand(2, 17, 3) * 100
    flipped = mirrored(points, 101, COCO)
    torch.testing.assert_close(flipped[:, 2, 0], 100 - points[:, 1, 0])
    torch.testing.assert_close(flipped[:, 0, 1:], points[:, 0, 1:])
    torch.testing.assert_close(mirrored(flipped, 101, COCO), points)


# ---- similarity --------------------------------------------------------------------------------------------


def test_similarity_is_the_mean_over_visible_keypoints() -> None:
    predicted, keypoints = torch.zeros(3, 2), torch.tensor([[0.1, 0.0], [0.0, 0.2], [9.0, 9.0]])
    sigmas, area = torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.25)
    found = oks(predicted, keypoints, torch.tensor([1.0, 1.0, 0.0]), area, sigmas)
    parts = [math.exp(-(d**2) / (2 * 0.25 * (2 * s) ** 2)) for d, s in ((0.1, 0.1), (0.2, 0.2))]
    assert float(found) == pytest.approx(sum(parts) / (2 + 1e-6), rel=1e-6)


def test_similarity_is_at_least_a_millionth_and_then_has_no_gradient() -> None:
    far = torch.full((2, 17, 2), 50.0, requires_grad=True)
    visible = torch.stack([torch.ones(17), torch.zeros(17)])
    found = oks(far, torch.zeros(17, 2), visible, torch.tensor(0.01), torch.tensor(COCO.sigmas))
    torch.testing.assert_close(found, torch.full((2,), 1e-6))
    found.sum().backward()
    assert far.grad is not None
    assert not far.grad.any()


def test_similarity_of_pairs_broadcasts() -> None:
    sigmas = torch.tensor(COCO.sigmas)
    predicted, keypoints = torch.rand(4, 17, 2), torch.rand(3, 17, 2)
    visible, area = (torch.rand(3, 17) < 0.5).float(), torch.rand(3)
    found = oks(predicted[:, None], keypoints, visible, area, sigmas)
    for i in range(4):
        torch.testing.assert_close(found[i], oks(predicted[i], keypoints, visible, area, sigmas))


def test_distance_counts_visible_keypoints_only() -> None:
    keypoints = torch.tensor([[[0.1, 0.2], [0.5, 0.5]]])
    target = {"keypoints": keypoints, "visible": torch.tensor([[1.0, 0.0]])}
    found = keypoint_distance({"keypoints": torch.zeros(1, 2, 2)}, target)
    torch.testing.assert_close(found, torch.tensor([0.3]))


# ---- loss --------------------------------------------------------------------------------------------------


def prediction(images: int = 2, count: int = 5, keypoints: int = 17) -> dict[str, Tensor]:
    logits = torch.randn(images, count, 2, requires_grad=True)
    return {"logits": logits, "keypoints": torch.rand(images, count, keypoints, 2, requires_grad=True)}


def outputs(auxiliary: int = 1, **options: int) -> dict:
    parts = [prediction(**options) for _ in range(auxiliary)]
    return {**prediction(**options), "auxiliary": parts, "proposals": prediction(**options)}


def target(count: int, keypoints: int = 17) -> dict[str, Tensor]:
    return {
        "labels": torch.ones(count, dtype=torch.long),
        "keypoints": torch.rand(count, keypoints, 2),
        "visible": torch.randint(3, (count, keypoints)),
        "area": torch.rand(count) + 0.1,
    }


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    total, parts = PoseLoss("coco")(outputs(2), [target(2), target(1)])
    suffixes = ("", "_0", "_1", "_interm")
    assert parts.keys() == {f"loss_{n}{s}" for n in ("ce", "keypoints", "oks") for s in suffixes}
    weights = {"ce": 2.0, "keypoints": 10.0, "oks": 4.0}
    weighed = [weights[name.split("_")[1]] * part for name, part in parts.items()]
    torch.testing.assert_close(total, torch.stack(weighed).sum())


def test_occluded_keypoints_count_as_visible() -> None:
    found, wanted = outputs(), [target(2), target(1)]
    seen = [{**t, "visible": (t["visible"] > 0).float()} for t in wanted]
    torch.testing.assert_close(PoseLoss("coco")(found, wanted), PoseLoss("coco")(found, seen))


def test_a_perfect_prediction_has_no_distance() -> None:
    wanted, found = [target(1)], outputs(0, images=1, count=1)
    wanted[0]["visible"][:] = 1
    found["keypoints"] = wanted[0]["keypoints"][None]
    _, parts = PoseLoss("coco")(found, wanted)
    assert float(parts["loss_keypoints"].detach()) == 0
    assert float(parts["loss_oks"].detach()) == pytest.approx(0, abs=1e-6)


def test_images_without_a_person_train() -> None:
    found = outputs()
    total, parts = PoseLoss("coco")(found, [target(0), target(0)])
    total.backward()
    assert float(parts["loss_keypoints"].detach()) == 0
    assert found["logits"].grad.any()


def test_any_skeleton_trains() -> None:
    total, _ = PoseLoss(4)(outputs(keypoints=4), [target(2, 4), target(1, 4)])
    assert total.isfinite()


def test_mistakes_in_targets_are_told() -> None:
    loss = PoseLoss("coco")
    with pytest.raises(DataError, match="predicts 14 keypoints, the skeleton has 17"):
        loss(outputs(keypoints=14), [target(1, 14), target(0, 14)])
    with pytest.raises(DataError, match=r"Image 1 has keypoints .*14, 2"):
        loss(outputs(), [target(1), target(1, 14)])
    flat = target(2) | {"area": torch.tensor([0.1, 0.0])}
    with pytest.raises(DataError, match=r"Object 1 of image 0 has the area 0\.0"):
        loss(outputs(), [flat, target(1)])
    broken = target(1)
    broken["keypoints"][0, 3, 1] = torch.nan
    with pytest.raises(DataError, match="Object 0 of image 1"):
        loss(outputs(), [target(1), broken])
    with pytest.raises(DataError, match="no 'visible'"):
        loss(outputs(), [{k: v for k, v in target(1).items() if k != "visible"}, target(1)])
