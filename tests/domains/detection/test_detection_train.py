"""`zoo train`, `evaluate`, `predict`, `finetune` and `data` of detection, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from annotated_small import PERSON, box, pose, write_coco
from command_line import QUIET, zoo

from zoo import create_model
from zoo.errors import CheckpointError, DataError
from zoo.weights.checkpoint import load_model, read_checkpoint

SMALL = (
    "data.count=[6,2,2]",
    "data.short=64",
    "data.augment.scales=[64]",
    "data.batch_size=3",
    "data.num_workers=0",
    "trainer.max_epochs=2",
    "schedule.warmup_steps=0",
)
TINY = ("model.num_queries=6", "model.embed_dim=32", "model.ffn_dim=32", "model.num_heads=2")
CATEGORIES = [{"id": 4, "name": "star"}, {"id": 9, "name": "moon"}]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Scenes are drawn apart from those of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "boxes"
    return run, zoo("train", "domain=detection", *SMALL, *TINY, *QUIET, f"run_dir={run}")


@pytest.fixture(scope="module")
def poses(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "poses"
    chosen = ("model=group_pose_mini", "data=figures")
    return run, zoo("train", "domain=detection", *chosen, *SMALL, *TINY, *QUIET, f"run_dir={run}")


def other_data(folder: Path) -> Path:
    """A star or a moon on each of five images of 40 x 60 pixels."""
    annotations = [box(i, i, (5, 6, 20, 10), 4 if i % 2 else 9) for i in range(1, 6)]
    folder = write_coco(folder, annotations, CATEGORIES, images=5)
    return folder / "annotations" / "instances_val2017.json"


def test_a_run_prints_and_keeps_what_it_reached(boxes: tuple[Path, str]) -> None:
    run, printed = boxes
    results = json.loads((run / "results.json").read_text())
    assert results["images"] == {"train": 6, "val": 2, "test": 2}
    assert list(results["scores"]) == ["group_detr_mini", "mean boxes", "untrained"]
    assert set(results["classes"]) == {"circle", "square", "triangle", "star"}
    own = results["scores"]["group_detr_mini"]
    assert f"AP50 {100 * own['AP50']:.1f}" in printed
    assert own["AP_large"] is None
    assert "Not defined, as there is nothing to find:" in printed
    for name in ("predictions.png", "precision_recall.png", "training.png"):
        assert (run / "plots" / name).stat().st_size > 5000
    found = json.loads((run / "plots" / "test_results.json").read_text())
    assert {entry["category_id"] for entry in found} <= {1, 2, 3, 4}
    assert "val/ap50" in (run / "metrics.csv").read_text()


def test_the_mapping_of_classes_is_stored_with_the_weights(boxes: tuple[Path, str]) -> None:
    extra = read_checkpoint(boxes[0] / "model.safetensors")[1]["extra"]
    assert extra["classes"] == ["circle", "square", "triangle", "star"]
    assert extra["category_ids"] == [1, 2, 3, 4]
    assert (extra["short"], extra["skeleton"]) == (64, None)


def test_poses_are_trained_and_judged_by_oks(poses: tuple[Path, str]) -> None:
    run, printed = poses
    results = json.loads((run / "results.json").read_text())
    assert results["kind"] == "keypoints"
    assert list(results["scores"]) == ["group_pose_mini", "mean pose", "untrained"]
    assert "by OKS" in printed
    assert len(read_checkpoint(run / "model.safetensors")[1]["extra"]["skeleton"]["names"]) == 17
    assert (run / "plots" / "predictions.png").stat().st_size > 5000


def test_evaluation_gives_the_numbers_of_the_run(boxes: tuple[Path, str], tmp_path: Path) -> None:
    run = boxes[0]
    zoo("evaluate", f"run={run}", f"output={tmp_path}", *QUIET[1:2], "plots=false")
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["scores"] == json.loads((run / "results.json").read_text())["scores"]


def test_other_files_are_evaluated_by_the_names_of_their_classes(
    boxes: tuple[Path, str], tmp_path: Path
) -> None:
    weights = boxes[0] / "model.safetensors"
    annotations = [box(i, i, (5, 6, 20, 10), 40) for i in (1, 2)]
    folder = write_coco(tmp_path, annotations, [{"id": 40, "name": "star"}])
    given = ("data=coco", f"data.path={folder}", f"output={tmp_path / 'out'}", QUIET[1])
    zoo("evaluate", f"checkpoint={weights}", *given)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["classes"]["star"]["objects"] == 2
    found = json.loads((tmp_path / "out" / "plots" / "test_results.json").read_text())
    assert {entry["category_id"] for entry in found} == {40}
    other = other_data(tmp_path / "moon")
    with pytest.raises(CheckpointError, match=r"the data also have moon\. Train it on these"):
        zoo("evaluate", f"checkpoint={weights}", "data=coco", f"data.path={other}", QUIET[1])


def test_weights_predict_images(boxes: tuple[Path, str], poses: tuple[Path, str], tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [], CATEGORIES, images=3) / "val2017"
    for name, (run, _) in (("boxes", boxes), ("poses", poses)):
        output = tmp_path / f"{name}.json"
        options = (f"input={folder}", f"output={output}", f"plots={tmp_path / name}", "threshold=0.0")
        printed = zoo("predict", f"run={run}", *options)
        assert "objects in 3 images" in printed
        found = json.loads(output.read_text())
        assert {entry["file_name"] for entry in found} == {"001.png", "002.png", "003.png"}
        assert ("keypoints" in found[0]) == (name == "poses")
        assert len(list((tmp_path / name).glob("*.png"))) == 3


def test_fine_tuning_to_other_classes_makes_new_heads(boxes: tuple[Path, str], tmp_path: Path) -> None:
    """Rows of classes that the checkpoint knows by name are taken over."""
    run = tmp_path / "run"
    data = (
        "data=coco",
        f"data.path={other_data(tmp_path)}",
        "data.augment=null",
        "data.short=64",
        "data.long=128",
    )
    rest = ("data.batch_size=2", "data.num_workers=0", "trainer.max_steps=1", "optimizer.lr=1e-12")
    printed = zoo("finetune", f"checkpoint={boxes[0]}", *data, *rest, *QUIET, f"run_dir={run}", "plots=false")
    assert "Class heads, 2 classes: 1 taken over (star), 1 start anew (moon)" in printed
    old, new = (load_model(folder / "model.safetensors")[0].state_dict() for folder in (boxes[0], run))
    assert new["class_embed.weight"].shape == (2, 32)
    torch.testing.assert_close(new["class_embed.weight"][0], old["class_embed.weight"][3])
    torch.testing.assert_close(new["query_embed.weight"], old["query_embed.weight"])
    extra = read_checkpoint(run / "model.safetensors")[1]["extra"]
    assert extra["category_ids"] == [4, 9]


def test_fine_tuning_to_another_skeleton(poses: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ends = {"id": 1, "name": "worm", "keypoints": ["head", "tail"], "skeleton": [[1, 2]]}
    points = {"keypoints": [6, 7, 2, 20, 12, 1], "num_keypoints": 2}
    annotations = [box(i, i, (5, 6, 20, 10)) | points for i in range(1, 6)]
    folder = write_coco(tmp_path, annotations, [ends], images=5)
    data = ("data=coco", f"data.path={folder / 'annotations/instances_val2017.json'}", "data.keypoints=true")
    rest = ("data.augment=null", "data.short=64", "data.long=128", "data.batch_size=2", "data.num_workers=0")
    printed = zoo(
        "finetune",
        f"checkpoint={poses[0]}",
        *data,
        *rest,
        *QUIET,
        "trainer.max_steps=1",
        f"run_dir={run}",
        "plots=false",
    )
    assert "1 start anew (worm)" in printed
    model = load_model(run / "model.safetensors")[0]
    assert model.num_keypoints == 2
    assert read_checkpoint(run / "model.safetensors")[1]["extra"]["skeleton"]["names"] == ["head", "tail"]


@pytest.mark.parametrize("method", ["head", "probe"])
def test_heads_alone_are_trained_on_frozen_features(
    boxes: tuple[Path, str], tmp_path: Path, method: str
) -> None:
    """All heads: one of new classes would be of no use untrained. A probe starts from fresh ones."""
    run = tmp_path / "run"
    given = ("data=coco", f"data.path={other_data(tmp_path)}", "data.augment=null", "data.short=64")
    rest = ("data.batch_size=2", "data.num_workers=0", "trainer.max_steps=2", "optimizer.lr=1e-3")
    options = (*given, "data.long=128", *rest, *QUIET, f"run_dir={run}", "plots=false", f"method={method}")
    printed = zoo("finetune", f"checkpoint={boxes[0]}", *options)
    assert re.search(rf"{method}: [\d,]+ of [\d,]+ parameters are trained", printed)
    old, new = (load_model(folder / "model.safetensors")[0].state_dict() for folder in (boxes[0], run))
    changed = {key for key in new if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])}
    assert {key.split(".")[0] for key in changed} == {"class_embed", "bbox_embed"}
    moved = (new["bbox_embed.layers.0.weight"] - old["bbox_embed.layers.0.weight"]).abs().max()
    assert (moved > 0.01) == (method == "probe")


@pytest.mark.parametrize(
    "name", ["group_detr_mini", "group_dab_mini", "group_deformable_mini", "group_pose_mini"]
)
def test_whatever_depends_on_classes_or_keypoints_is_a_head(name: str) -> None:
    same: dict[str, Any] = {"num_keypoints": 3} if "pose" in name else {}
    other: dict[str, Any] = {"num_keypoints": 5} if "pose" in name else {}
    first, second = create_model(name, num_classes=2, **same), create_model(name, num_classes=3, **other)
    sizes = {key: value.shape for key, value in second.state_dict().items()}
    depending = {key.split(".")[0] for key, v in first.state_dict().items() if v.shape != sizes[key]}
    heads = set(cast(Any, first).head_modules)
    assert depending
    assert depending <= heads <= {child for child, _ in first.named_children()}


def test_a_pose_model_on_boxes_is_told_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data.keypoints=true, or take data with keypoints"):
        zoo("train", "domain=detection", "model=group_pose_mini", *SMALL, *QUIET, f"run_dir={tmp_path}")


def test_scenes_are_written_and_described(tmp_path: Path) -> None:
    file = write_coco(tmp_path, [pose(1, 1, (5, 5, 20, 20))], [PERSON]) / "annotations/instances_val2017.json"
    printed = zoo("data", "info", str(file), "keypoints=true", "--domain", "detection")
    assert "2 images, 1 objects" in printed
    assert "left_ankle" in " ".join(printed.split())


@pytest.mark.slow
def test_both_models_learn_the_real_images_by_heart(shared_data: Path, tmp_path: Path) -> None:
    """Four photographs of COCO: the loss falls, and AP of what was trained on is high."""
    file = shared_data / "detection/coco/annotations/person_keypoints_val2017.json"
    same = ("data=coco", *(f"data.{part}={file}" for part in ("train", "val", "test")), "data.augment=null")
    size = ("data.short=160", "data.long=256", "data.batch_size=4", "data.num_workers=0")
    steps = ("trainer.max_epochs=400", "trainer.check_val_every_n_epoch=100", "optimizer.lr=1e-3")
    rest = ("optimizer.lr_factors=null", "schedule.name=cosine")
    for name, keypoints in (("group_detr_mini", False), ("group_pose_mini", True)):
        run = tmp_path / name
        zoo(
            "train",
            "domain=detection",
            f"model={name}",
            *same,
            f"data.keypoints={str(keypoints).lower()}",
            *size,
            *steps,
            *rest,
            *QUIET,
            f"run_dir={run}",
            "plots=false",
        )
        stats = json.loads((run / "results.json").read_text())["scores"][name]
        assert stats["AP50"] > 0.5
        assert np.isfinite(stats["AP"])
