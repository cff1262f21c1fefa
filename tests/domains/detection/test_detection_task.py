"""Metrics, baselines, losses and the course of a task on data of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_small import PERSON, SHAPES, box, pose, two_images, write_coco
from omegaconf import OmegaConf

import zoo
from domains.detection import metrics
from domains.detection.annotations import CROWDPOSE_AREA, skeleton_facts, skeleton_from
from domains.detection.baselines import mean_results, untrained_like
from domains.detection.data import DetectionData
from domains.detection.keypoints import COCO, CROWDPOSE, PoseLoss
from domains.detection.matching import SetLoss
from domains.detection.metrics import coco_scores
from domains.detection.sources.layouts import read_parts
from domains.detection.task import DetectionTask, batch_hint, build_loss, coco_results
from domains.detection.transfer import official_facts
from zoo.config import compose
from zoo.errors import ConfigError, DataError


def truth(tmp_path: Path) -> dict[str, Any]:
    (part,) = read_parts("coco", two_images(tmp_path)).values()
    return part.as_coco()


def perfect(content: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("image_id", "category_id", "bbox")
    return [{key: entry[key] for key in keys} | {"score": 0.9} for entry in content["annotations"]]


# ---- metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_reference_results_give_the_reference_numbers(shared_data: Path, kind: str) -> None:
    folder = shared_data / "detection" / "coco"
    found = coco_scores(
        folder / "annotations/person_keypoints_val2017.json", folder / f"jittered_{kind}_results.json", kind
    )
    expected = json.loads((folder / f"jittered_{kind}_stats.json").read_text())["stats"]
    assert [-1 if value is None else value for value in found.stats.values()] == expected


def test_perfect_results_are_perfect_and_what_is_not_there_is_undefined(tmp_path: Path) -> None:
    content = truth(tmp_path)
    found = coco_scores(content, perfect(content), "bbox")
    assert found.stats["AP"] == pytest.approx(1)
    assert found.stats["AP_large"] is None
    assert found.classes == {
        "cat": {"AP": pytest.approx(1), "AP50": pytest.approx(1), "objects": 1},
        "dog": {"AP": pytest.approx(1), "AP50": pytest.approx(1), "objects": 2},
    }
    np.testing.assert_allclose(found.precision, 1)


def test_no_results_are_a_score_of_zero(tmp_path: Path) -> None:
    found = coco_scores(truth(tmp_path), [], "bbox")
    assert found.stats["AP"] == 0
    assert found.stats["AR100"] == 0


def test_a_class_without_objects_is_undefined_and_not_averaged(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [box(1, 1, (5, 6, 20, 10), 3)], SHAPES)
    (part,) = read_parts("coco", folder).values()
    content = part.as_coco()
    found = coco_scores(content, perfect(content), "bbox")
    assert found.classes["dog"] == {"AP": None, "AP50": None, "objects": 0}
    assert found.stats["AP"] == pytest.approx(1)


def test_results_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    content = truth(tmp_path)
    with pytest.raises(DataError, match="Result 0 is of image 77"):
        coco_scores(content, [{**perfect(content)[0], "image_id": 77}], "bbox")
    with pytest.raises(DataError, match="Result 0 has no 'keypoints'"):
        coco_scores(content, perfect(content), "keypoints")
    with pytest.raises(DataError, match="not finite"):
        coco_scores(content, [{**perfect(content)[0], "score": float("nan")}], "bbox")


def test_pycocotools_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    content = truth(tmp_path)
    results = perfect(content)
    x, *rest = results[1]["bbox"]
    results[1]["bbox"] = [x + 6, *rest]
    faster = coco_scores(content, results, "bbox")
    real = metrics.importlib.util.find_spec
    monkeypatch.setattr(
        metrics.importlib.util, "find_spec", lambda n: None if n == "faster_coco_eval" else real(n)
    )
    assert coco_scores(content, results, "bbox").stats == faster.stats
    assert faster.stats["AP"] is not None
    assert faster.stats["AP"] < 1


def test_crowdpose_is_judged_by_its_rules(tmp_path: Path) -> None:
    """As `keypoints_crowd` of faster-coco-eval, and by crowdedness."""
    tool = pytest.importorskip("faster_coco_eval")
    draw = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    for image in range(1, 7):
        points = draw.uniform(5, 35, (14, 2))
        flat = np.concatenate([points, np.full((14, 1), 2)], 1).reshape(-1).tolist()
        entry = box(image, image, (5, 5, 30, 30)) | {"keypoints": flat, "num_keypoints": 14}
        del entry["area"]
        annotations.append(entry)
    person = {"id": 1, "name": "person", "keypoints": list(CROWDPOSE.names), "skeleton": []}
    file = "json/crowdpose_test.json"
    write_coco(tmp_path, annotations, [person], images=6, file=file, image_folder="images")
    content = json.loads((tmp_path / file).read_text())
    for image in content["images"]:
        image["crowdIndex"] = 0.15 * image["id"]
    (tmp_path / file).write_text(json.dumps(content))
    results = [
        {
            "image_id": entry["image_id"],
            "category_id": 1,
            "score": float(draw.random()),
            "keypoints": (np.array(entry["keypoints"]) + draw.normal(0, 1.5, 42)).tolist(),
        }
        for entry in annotations
    ]
    part = read_parts("coco", tmp_path, keypoints=True)["test"]
    found = coco_scores(part.as_coco(), results, "crowdpose", CROWDPOSE.sigmas)
    ground = tool.COCO(str(tmp_path / file))
    judge = tool.COCOeval_faster(
        ground, ground.loadRes(results), "keypoints_crowd", kpt_oks_sigmas=CROWDPOSE.sigmas, use_area=False
    )
    judge.params.kpt_oks_sigmas = np.array(CROWDPOSE.sigmas)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    expected = list(judge.all_stats)
    assert list(found.stats.values())[:6] == pytest.approx(expected[:6])
    assert list(found.stats.values())[6:] == pytest.approx(expected[6:], abs=1e-4)
    assert 0 < expected[0] < 1


# ---- baselines ---------------------------------------------------------------------------------------------


def test_the_mean_box_of_each_class_is_scored_by_its_share(tmp_path: Path) -> None:
    (part,) = read_parts("coco", two_images(tmp_path)).values()
    found = mean_results(part, part.subset([0]), pose=False)
    assert [(entry["category_id"], entry["score"]) for entry in found] == [(3, 0.5), (17, 1.0)]
    np.testing.assert_allclose(found[0]["bbox"], [5, 6, 20, 10])
    np.testing.assert_allclose(found[1]["bbox"], [15, 5, 22.5, 25])


def test_the_mean_pose_is_over_labelled_keypoints(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [pose(1, 1, (0, 0, 20, 20)), pose(2, 2, (20, 0, 40, 40), 5)], [PERSON])
    (part,) = read_parts(
        "coco", folder / "annotations/instances_val2017.json", images=folder / "val2017", keypoints=True
    ).values()
    (entry, _) = mean_results(part, part, pose=True)
    points = np.array(entry["keypoints"]).reshape(17, 3)
    np.testing.assert_allclose(points[4, :2], [(5 + 30) / 2, (5 + 10) / 2])
    np.testing.assert_allclose(points[16, :2], [20, 20])


def test_an_untrained_model_has_other_weights_and_leaves_the_random_state() -> None:
    torch.manual_seed(1)
    model = zoo.create_model("group_detr_mini", num_classes=3, num_queries=4, embed_dim=32)
    before = torch.get_rng_state()
    fresh: Any = untrained_like(model)
    assert torch.equal(before, torch.get_rng_state())
    assert fresh.num_queries == 4
    assert not torch.equal(fresh.query_embed.weight, model.query_embed.weight)  # pyright: ignore


# ---- the task ----------------------------------------------------------------------------------------------


def test_losses_by_what_the_model_predicts() -> None:
    boxes = build_loss(l1=3.0, giou=1.0, ce=0.5)
    assert isinstance(boxes, SetLoss)
    assert [(term.name, term.weight) for term in boxes.terms] == [("bbox", 3.0), ("giou", 1.0)]
    assert (boxes.focal.weight, boxes.focal.cost) == (0.5, 0.5)
    poses = build_loss(COCO, oks=2.0)
    assert isinstance(poses, PoseLoss)
    assert [term.weight for term in poses.losses.terms] == [10.0, 2.0]
    with pytest.raises(ConfigError, match=r"no loss\.name=l1"):
        build_loss(name="l1")


@pytest.mark.parametrize(
    ("batch", "accumulated", "lr", "hint"),
    [
        (16, 1, 1e-4, None),
        (4, 4, 1e-4, None),
        (
            4,
            1,
            1e-4,
            "4 images a step, .* has 16: .* optimizer.lr=2.5e-05; .*accumulate_grad_batches=4.$",
        ),
        (32, 1, 1e-4, "32 images a step, .* optimizer.lr=0.0002.$"),
        (6, 1, 1e-4, "optimizer.lr=3.75e-05.$"),
        (4, 2, 5e-5, "^8 images a step, where the published recipe has 16: AP may differ.$"),
    ],
)
def test_batches_of_another_size_than_published_are_told_the_learning_rate(
    batch: int, accumulated: int, lr: float, hint: str | None
) -> None:
    cfg = compose("train", ["domain=detection", "data=coco", f"optimizer.lr={lr}"])
    found = batch_hint(cfg, batch, accumulated)
    assert found is None if hint is None else re.search(hint, found or "")
    assert batch_hint(compose("train", ["domain=detection"]), batch, accumulated) is None


def _one_object(tmp_path: Path) -> DetectionData:
    """Two images, of which the second is empty."""
    folder = write_coco(tmp_path, [box(1, 1, (5, 6, 20, 10), 3)], SHAPES)
    file = folder / "annotations/instances_val2017.json"
    data = DetectionData("coco", train=file, val=file, test=file, short=40, long=60)
    data.setup("fit")
    return data


SMALL = {"num_classes": 2, "num_queries": 4, "embed_dim": 32}


def test_denoising_adds_to_the_loss_of_training_only(tmp_path: Path) -> None:
    data = _one_object(tmp_path)
    model = zoo.create_model("group_deformable_mini", **SMALL, denoising=5)
    task = DetectionTask(model.train(), OmegaConf.create(), data.extra())
    batch = data.collate([data.train_set[0]])
    outputs: Any = model(batch[0]["images"], batch[0]["mask"], targets=batch[0]["targets"])
    alone = task._error({k: v for k, v in outputs.items() if k != "denoised"}, batch[0]["targets"])
    total = task.loss(batch, "train")[0]
    assert float(total.detach()) > 1.2 * float(alone.detach())
    total.backward()
    assert float(model.label_embed.weight.grad.abs().sum()) > 0  # pyright: ignore
    assert "denoised" not in model.eval()(batch[0]["images"], batch[0]["mask"])


@pytest.mark.parametrize("options", [{}, {"denoising": 5}])
def test_a_batch_without_any_object_trains(tmp_path: Path, options: dict[str, int]) -> None:
    data = _one_object(tmp_path)
    name = "group_deformable_mini" if options else "group_detr_mini"
    model = zoo.create_model(name, **SMALL, **options).train()
    task = DetectionTask(model, OmegaConf.create(), data.extra())
    total, count = task.loss(data.collate([data.train_set[1]]), "train")
    total.backward()
    assert int(count) == 1
    assert float(total.detach()) > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_results_are_in_the_format_of_coco() -> None:
    found = {
        "scores": torch.tensor([0.9, 0.5, 0.1]),
        "labels": torch.tensor([1, 0, 2]),
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 1, 1], [0, 0, 1, 1]]),
    }
    (entry,) = coco_results(found, 7, [None, 5])
    assert entry == {
        "image_id": 7,
        "category_id": 5,
        "score": pytest.approx(0.9),
        "bbox": [1.0, 2.0, 10.0, 20.0],
    }


def test_a_pose_model_needs_keypoints(tmp_path: Path) -> None:
    data = DetectionData("coco", two_images(tmp_path) / "annotations/instances_val2017.json")
    data.setup("test")
    with pytest.raises(DataError, match=r"set data\.keypoints=true"):
        data.use(True)


def test_official_weights_number_classes_by_category() -> None:
    model = zoo.create_model("group_detr_mini", num_classes=91, num_queries=4, embed_dim=32)
    facts = official_facts(model)
    assert facts["classes"][1] == "person"
    assert facts["classes"][90] == "toothbrush"
    assert facts["classes"][12] is None
    assert sum(name is not None for name in facts["classes"]) == 80
    assert facts["category_ids"][90] == 90


def test_skeletons_survive_json() -> None:
    assert skeleton_from(json.loads(json.dumps(skeleton_facts(CROWDPOSE)))) == CROWDPOSE
    assert CROWDPOSE_AREA == 0.53
