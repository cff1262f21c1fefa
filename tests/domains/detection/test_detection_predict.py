"""From images and trained weights to results, tables and drawings."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from annotated_small import write_image
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from domains.detection import frames
from domains.detection.annotations import skeleton_facts
from domains.detection.drawing import Shown, drawn
from domains.detection.frames import find_inputs, read_frames
from domains.detection.keypoints import COCO
from domains.detection.predict import predict
from zoo.errors import ConfigError, DataError, MissingExtra

FACTS = {"classes": ["cat", None, "dog"], "category_ids": [3, None, 17], "short": 32, "long": 64}


class Brightest(nn.Module):
    """Finds a cat in the left half, something unnamed, and a dog with the mean of the image as its score."""

    def __init__(self, pose: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.pose, self.shapes = pose, []

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return images.mean((1, 2, 3))

    def postprocess(self, outputs: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        found = []
        for mean, (height, width) in zip(outputs, sizes.tolist(), strict=True):
            scores = torch.stack([torch.tensor(0.9), torch.tensor(0.8), mean.sigmoid() * 0.4])
            place = torch.tensor([[0.0, 0, width / 2, height]]).repeat(3, 1)
            entry = {"scores": scores, "labels": torch.tensor([0, 1, 2])}
            if self.pose:
                points = torch.linspace(0, 1, 17)[:, None] * torch.tensor([width, height])
                found.append(entry | {"keypoints": points.repeat(3, 1, 1)})
            else:
                found.append(entry | {"boxes": place})
        return found


def settings(source: Path, folder: Path, **changes: Any) -> Any:
    plain = {
        "input": str(source),
        "output": str(folder / "found.json"),
        "plots": None,
        "threshold": 0.5,
        "short": None,
        "long": None,
        "batch_size": 2,
        "corrupt": "skip",
        "device": "cpu",
    }
    return OmegaConf.create(plain | changes)


def test_results_of_a_folder_are_coco_json_in_pixels(tmp_path: Path) -> None:
    for i, size in enumerate([(40, 60), (40, 60), (40, 60), (30, 30)]):
        write_image(tmp_path / "in" / f"{i}.png", size, seed=i)
    model = Brightest()
    (written,) = predict(model, FACTS, settings(tmp_path / "in", tmp_path))
    found = json.loads(written.read_text())
    assert [entry["file_name"] for entry in found] == ["0.png", "1.png", "2.png", "3.png"]
    assert found[0] == {
        "image_id": 1,
        "file_name": "0.png",
        "category_id": 3,
        "category": "cat",
        "score": pytest.approx(0.9),
        "bbox": [0, 0, 30, 40],
    }
    assert model.shapes == [(2, 3, 32, 48), (1, 3, 32, 48), (1, 3, 32, 32)]


def test_tables_and_lower_thresholds(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    cfg = settings(tmp_path / "a.png", tmp_path, output=str(tmp_path / "t.csv"), threshold=0.0)
    table = pd.read_csv(predict(Brightest(), FACTS, cfg)[0])
    assert table["class"].tolist() == ["cat", "dog"]
    assert table.columns.tolist() == ["file", "class", "score", "x1", "y1", "x2", "y2"]
    assert table["x2"].tolist() == [30, 30]


def test_poses_are_written_with_names_and_drawn(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    facts = FACTS | {"skeleton": skeleton_facts(COCO)}
    cfg = settings(
        tmp_path / "a.png", tmp_path, output=str(tmp_path / "t.parquet"), plots=str(tmp_path / "p")
    )
    table, picture = predict(Brightest(pose=True), facts, cfg)
    row = pd.read_parquet(table).iloc[0]
    assert (row["right_ankle_x"], row["right_ankle_y"]) == (60, 40)
    assert (row["x2"], row["y2"]) == (60, 40)
    assert picture == tmp_path / "p" / "0001_a.png.png"
    original = Image.open(tmp_path / "a.png").resize((480, 320))
    assert (np.asarray(Image.open(picture)) != np.asarray(original)).any()


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no image")
    cfg = settings(tmp_path / "in", tmp_path)
    predict(Brightest(), FACTS, cfg)
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 files were left out" in printed
    assert "b.jpg cannot be read as an image" in printed
    with pytest.raises(DataError, match=r"b.jpg cannot be read"):
        predict(Brightest(), FACTS, settings(tmp_path / "in", tmp_path, corrupt="error"))
    with pytest.raises(DataError, match="None of the 1 files"):
        predict(Brightest(), FACTS, settings(tmp_path / "in" / "b.jpg", tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "found.txt"}, "output=found.txt"),
        ({"threshold": 2.0}, "threshold=2.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"corrupt": "ignore"}, "corrupt=ignore"),
        ({"device": "gpu"}, "device=gpu"),
        ({"input": None}, "zoo predict needs images"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=message):
        predict(Brightest(), FACTS, settings(tmp_path / "a.png", tmp_path, **changes))


def animation(path: Path) -> Path:
    """A red, a green and a blue frame of 10 x 20 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    return path


class Capture:
    """As `cv2.VideoCapture`: two frames, blue, green and red first; none of an empty file."""

    def __init__(self, path: str) -> None:
        self.left = 2 if Path(path).stat().st_size else 0

    def get(self, what: str) -> float:
        return {"frames": self.left}[what]

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        blue = np.zeros((10, 20, 3), np.uint8)
        blue[..., 0] = 255
        return (True, blue) if self.left >= 0 else (False, None)

    def release(self) -> None:
        self.left = 0


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV, and no PyAV, as far as can be seen."""
    real = importlib.util.find_spec
    found = {"av": None, "cv2": True}
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda n: found[n] if n in found else real(n))
    monkeypatch.setitem(
        sys.modules, "cv2", SimpleNamespace(VideoCapture=Capture, CAP_PROP_FRAME_COUNT="frames")
    )


def test_frames_of_an_animation_and_a_video_are_numbered_and_drawn(tmp_path: Path, opencv: None) -> None:
    animation(tmp_path / "in" / "a.gif")
    write_image(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "c.mp4").write_bytes(b"video")
    cfg = settings(tmp_path / "in", tmp_path, plots=str(tmp_path / "p"))
    written, *drawings = predict(Brightest(), FACTS, cfg)
    found = json.loads(written.read_text())
    names = ["a.gif#0", "a.gif#1", "a.gif#2", "b.png", "c.mp4#0", "c.mp4#1"]
    assert [(e["image_id"], e["file_name"]) for e in found] == list(enumerate(names, 1))
    assert [path.name for path in drawings] == [
        "0001_a.gif_000000.png",
        "0002_a.gif_000001.png",
        "0003_a.gif_000002.png",
        "0004_b.png.png",
        "0005_c.mp4_000000.png",
        "0006_c.mp4_000001.png",
    ]
    corners = [np.asarray(Image.open(path).convert("RGB"))[-1, -1].argmax() for path in drawings]
    assert corners[:3] == [0, 1, 2]
    assert corners[4] == 2


def test_damaged_animations_and_videos_are_named(tmp_path: Path, opencv: None) -> None:
    file = tmp_path / "a.gif"
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    pictures = [Image.fromarray(frame) for frame in noise]
    pictures[0].save(file, save_all=True, append_images=pictures[1:])
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a\.gif cannot be read as an"):
        list(read_frames(file))
    (tmp_path / "v.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"v\.mp4 cannot be read as a video"):
        list(read_frames(tmp_path / "v.mp4"))


def test_every_frame_of_an_animation_is_an_image(tmp_path: Path) -> None:
    found = list(read_frames(animation(tmp_path / "a.gif")))
    assert [frame.name for frame in found] == ["a.gif#0", "a.gif#1", "a.gif#2"]
    assert [np.asarray(frame.image)[5, 5].argmax() for frame in found] == [0, 1, 2]


def test_a_video_needs_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v.mp4").write_bytes(b"")
    real = importlib.util.find_spec
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda n: None if n in ("av", "cv2") else real(n))
    assert find_inputs(str(tmp_path)) == [tmp_path / "v.mp4"]
    with pytest.raises(MissingExtra, match=r"PyAV \(pip install av\) or OpenCV"):
        list(read_frames(tmp_path / "v.mp4"))
    write_image(tmp_path / "a.png")
    model = Brightest()
    with pytest.raises(MissingExtra, match=r"v\.mp4 is a video"):
        predict(model, FACTS, settings(tmp_path, tmp_path))
    assert not model.shapes


def test_drawings_show_boxes_at_their_place() -> None:
    image = Image.new("RGB", (100, 80))
    picture = np.asarray(drawn(image, [Shown("", 0, (20, 30, 60, 50))], scale=2, colours=("#FF0000",)))
    assert picture.shape == (160, 200, 3)
    rows, columns = np.nonzero(picture[..., 0])
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (40, 60, 120, 100)
    assert not np.asarray(image).any()
