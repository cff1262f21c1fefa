"""`zoo evaluate results=FILE`: judging what any program found, without a model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from annotated_small import PERSON, pose, two_images, write_coco
from typer.testing import CliRunner

from zoo.cli import app
from zoo.errors import ConfigError, DataError


def evaluate(*arguments: object) -> str:
    """What the command prints; a ZooError is raised as it is."""
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "140"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def judge(results: Any, folder: Path, truth: Path, *more: object) -> tuple[str, dict[str, Any]]:
    """What is printed, and `results.json`."""
    file = results
    if not isinstance(results, Path):
        file = folder / "found.json"
        file.write_text(json.dumps(results))
    given = ("domain=detection", f"results={file}", "data=coco", f"data.test={truth}")
    printed = evaluate(*given, f"output={folder / 'out'}", "plots=false", *more)
    return printed, json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """A cat and a dog on the first image, a dog on the second; categories 3 and 17."""
    return two_images(tmp_path) / "annotations" / "instances_val2017.json"


def perfect(truth: Path) -> list[dict[str, Any]]:
    keys = ("image_id", "category_id", "bbox")
    content = json.loads(truth.read_text())
    return [{key: entry[key] for key in keys} | {"score": 0.9} for entry in content["annotations"]]


@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_the_figures_are_those_of_the_tools(shared_data: Path, tmp_path: Path, kind: str) -> None:
    """Also where the annotations are alone, without their images."""
    folder = shared_data / "detection" / "coco"
    alone = tmp_path / "person_keypoints_val2017.json"
    shutil.copyfile(folder / "annotations/person_keypoints_val2017.json", alone)
    poses = f"data.keypoints={str(kind == 'keypoints').lower()}"
    printed, found = judge(folder / f"jittered_{kind}_results.json", tmp_path, alone, poses)
    expected = json.loads((folder / f"jittered_{kind}_stats.json").read_text())["stats"]
    stats = found["scores"][f"jittered_{kind}_results"]
    assert [-1 if value is None else value for value in stats.values()] == expected
    assert f"jittered_{kind}_results: AP {100 * expected[0]:.1f}, AP50 {100 * expected[1]:.1f}." in printed
    assert found["images"] == {"test": 4}


def test_tables_and_pictures_are_those_of_a_trained_model(tmp_path: Path, truth: Path) -> None:
    printed, found = judge(perfect(truth), tmp_path, truth, "plots=true")
    assert found["scores"]["found"]["AP"] == pytest.approx(1)
    assert found["classes"]["dog"] == {"AP": pytest.approx(1), "AP50": pytest.approx(1), "objects": 2}
    assert found["found"] == 3
    assert "Images: 2 test (3 objects); 2 classes" in printed
    assert "found: AP 100.0, AP50 100.0." in printed
    assert "Not defined, as there is nothing to find: AP_medium, AP_large" in printed
    for name in ("precision_recall.png", "predictions.png"):
        assert (tmp_path / "out" / "plots" / name).stat().st_size > 3000


def test_results_that_name_files_belong_to_the_images_of_those_names(tmp_path: Path, truth: Path) -> None:
    """As of `zoo predict`, which numbers what it was given."""
    content = json.loads(truth.read_text())
    for i, image in enumerate(content["images"]):
        image["id"] = 70 + i
    for entry in content["annotations"]:
        entry["image_id"] += 69
    names = {image["id"]: image["file_name"] for image in content["images"]}
    truth.write_text(json.dumps(content))
    found = [entry | {"file_name": names[entry["image_id"]], "image_id": 1} for entry in perfect(truth)]
    _, results = judge(found, tmp_path, truth)
    assert results["scores"]["found"]["AP"] == pytest.approx(1)
    found[1]["file_name"] = "other.png"
    with pytest.raises(DataError, match=r"Result 1 is of other\.png; the annotations have no image of that"):
        judge(found, tmp_path, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, r"found\.json: Result 1 is of image 77, which the annotations do not list"),
        ({"image_id": "1"}, r"is of image '1', which"),
        ({"image_id": [1]}, r"Result 1: image_id=\[1\] is no id"),
        ({"category_id": {}}, r"Result 1: category_id=\{\} is no id"),
        ({"category_id": 1}, r"Result 1 \(image id 1\) is of category 1; the annotations have 3 \(cat\), 17"),
        ({"score": math.nan}, r"Result 1 \(image id 1\): score has numbers that are not finite"),
        ({"score": None}, r"score=\[None\] is not of numbers"),
        ({"bbox": [1, 2, 3]}, r"bbox has 3 numbers, not 4: x, y, width, height"),
        ({"bbox": [1, 2, 3, math.inf]}, "bbox has numbers that are not finite"),
        ({"bbox": [[1, 2], [3, 4]]}, "is not of numbers"),
    ],
)
def test_results_that_do_not_belong_are_named(
    tmp_path: Path, truth: Path, change: dict[str, Any], message: str
) -> None:
    found = perfect(truth)
    found[1] |= change
    with pytest.raises(DataError, match=message):
        judge(found, tmp_path, truth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", r"found\.json is no whole json file"),
        ('{"images": []}', "Results are a list of objects"),
        ("[[1, 2]]", r"Result 0 is \[1, 2\]: an object with image_id"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path: Path, truth: Path, text: str, message: str) -> None:
    (tmp_path / "found.json").write_text(text)
    with pytest.raises(DataError, match=message):
        judge(tmp_path / "found.json", tmp_path, truth)
    with pytest.raises(DataError, match=r"gone\.json cannot be read"):
        judge(tmp_path / "gone.json", tmp_path, truth)


def test_poses_have_the_keypoints_of_the_annotations(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [pose(1, 1, (5, 5, 20, 20))], [PERSON])
    truth = folder / "annotations" / "instances_val2017.json"
    (entry,) = json.loads(truth.read_text())["annotations"]
    found = {"image_id": 1, "category_id": 1, "score": 0.5, "keypoints": entry["keypoints"]}
    _, results = judge([found], tmp_path, truth, "data.keypoints=true")
    assert results["kind"] == "keypoints"
    assert results["scores"]["found"]["AP"] == pytest.approx(1)
    with pytest.raises(DataError, match=r"Result 0 has no 'bbox'\. To judge poses: data\.keypoints=true"):
        judge([found], tmp_path, truth)
    short = found | {"keypoints": entry["keypoints"][:48]}
    with pytest.raises(DataError, match="keypoints has 48 numbers, not 51"):
        judge([short], tmp_path, truth, "data.keypoints=true")


def test_what_is_asked_for_has_to_fit(tmp_path: Path, truth: Path) -> None:
    given = (f"results={tmp_path}/found.json", "data=coco", f"data.test={truth}")
    with pytest.raises(ConfigError, match="judges results alone: leave out run=runs/a"):
        evaluate("domain=detection", *given, "run=runs/a")
    with pytest.raises(ConfigError, match="needs a domain and data to judge by"):
        evaluate(*given)
    with pytest.raises(ConfigError, match="domain=traffic reads no results of other programs"):
        evaluate("domain=traffic", *given)
    with pytest.raises(ConfigError, match="takes model and domain from the weights; leave out domain"):
        evaluate("domain=detection", "run=runs/a")
