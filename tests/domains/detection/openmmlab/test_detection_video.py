"""Videos of real files: OpenCV, which comes with mmdet, writes them, and whatever is installed reads them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import zoo
from PIL import Image

from domains.detection import frames
from domains.detection.frames import read_frames
from zoo import create_model, save_model
from zoo.errors import DataError

FRAMES, HEIGHT, WIDTH = 20, 48, 64
COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
CODECS = {".avi": "MJPG", ".mp4": "mp4v"}


@pytest.fixture(params=["cv2", "av"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that reads, as if the other were not there."""
    pytest.importorskip("cv2")
    pytest.importorskip(request.param)
    real = importlib.util.find_spec
    hidden = {"cv2": "av", "av": "cv2"}[request.param]
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda n: None if n == hidden else real(n))
    return request.param


def write_video(path: Path) -> Path:
    """Frames that are red, green and blue in turn, with noise at the top so that none is small."""
    cv2: Any = pytest.importorskip("cv2")
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODECS[path.suffix]), 10, (WIDTH, HEIGHT))
    draw = np.random.default_rng(0)
    for i in range(FRAMES):
        picture = np.full((HEIGHT, WIDTH, 3), COLOURS[i % 3], np.uint8)
        picture[:20] = draw.integers(0, 256, (20, WIDTH, 3))
        out.write(picture[..., ::-1].copy())
    out.release()
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small detector of cats and dogs that has learnt nothing."""
    model = create_model("detection/group_detr_mini", num_classes=2, num_queries=5, embed_dim=32)
    facts = {"data": None, "classes": ["cat", "dog"], "category_ids": [3, 17], "skeleton": None}
    save_model(model, tmp_path / "w.safetensors", extra=facts | {"short": 48, "long": 64})
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_have_their_colours_in_their_order(reader: str, suffix: str, tmp_path: Path) -> None:
    found = list(read_frames(write_video(tmp_path / f"clip{suffix}")))
    assert [frame.name for frame in found] == [f"clip{suffix}#{i}" for i in range(FRAMES)]
    for i, frame in enumerate(found):
        assert frame.image.size == (WIDTH, HEIGHT)
        colour = np.asarray(frame.image)[40, 32].astype(int)
        assert np.abs(colour - COLOURS[i % 3]).max() < 40


def test_a_video_is_predicted_and_drawn_from_the_command_line(
    reader: str, weights: Path, tmp_path: Path
) -> None:
    clip, output, drawn = write_video(tmp_path / "clip.mp4"), tmp_path / "found.json", tmp_path / "drawn"
    given = (f"checkpoint={weights}", f"input={clip}", f"output={output}", f"plots={drawn}")
    printed = zoo("predict", "domain=detection", *given, "threshold=0.0", "device=cpu")
    assert f"{FRAMES * 10} objects in {FRAMES} images" in printed
    found = json.loads(output.read_text())
    places = {(entry["image_id"], entry["file_name"]) for entry in found}
    assert places == {(i + 1, f"clip.mp4#{i}") for i in range(FRAMES)}
    assert {(entry["category_id"], entry["category"]) for entry in found} == {(3, "cat"), (17, "dog")}
    pictures = sorted(drawn.iterdir())
    assert [path.name for path in pictures] == [f"{i + 1:04d}_clip.mp4_{i:06d}.png" for i in range(FRAMES)]
    assert Image.open(pictures[0]).size == (8 * WIDTH, 8 * HEIGHT)
    assert zoo("predict", "domain=detection", *given[:3], "threshold=0.99", "device=cpu").count("none") > 0


def test_a_video_that_was_cut_off_is_named(reader: str, tmp_path: Path) -> None:
    avi, mp4 = (write_video(tmp_path / f"clip{suffix}") for suffix in CODECS)
    for path in (avi, mp4):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = []
    with pytest.raises(DataError, match=rf"clip\.avi ends after \d+ of {FRAMES} frames: was it cut off"):
        found.extend(read_frames(avi))
    assert 0 < len(found) < FRAMES
    with pytest.raises(DataError, match=r"clip\.mp4 cannot be read as a video"):
        list(read_frames(mp4))


def test_predictions_of_a_cut_video_are_kept_and_the_cut_is_told(
    reader: str, weights: Path, tmp_path: Path
) -> None:
    clip = write_video(tmp_path / "clip.avi")
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    given = (f"checkpoint={weights}", f"input={clip}", f"output={tmp_path / 'found.json'}", "device=cpu")
    printed = zoo("predict", "domain=detection", *given, "threshold=0.0")
    assert "clip.avi ends after" in " ".join(printed.split())
    found = json.loads((tmp_path / "found.json").read_text())
    assert 0 < len({entry["file_name"] for entry in found}) < FRAMES
    with pytest.raises(DataError, match=r"clip\.avi ends after"):
        zoo("predict", "domain=detection", *given, "corrupt=error")
