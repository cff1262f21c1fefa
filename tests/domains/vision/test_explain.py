"""`zoo explain` on images: places of every family, what is drawn, what is told."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import command_line
import pytest
import torch
from pictures import folders, picture
from PIL import Image
from small_backbones import SMALL, build, images, settled

import zoo as library
from domains.vision.models.davit import DaViT
from domains.vision.models.inline import InLineDeiT, InLinePVT
from domains.vision.models.sret import SReT
from domains.vision.preprocess import Preprocessing
from domains.vision.recording import record
from zoo.attention import AttentionError
from zoo.errors import ConfigError, DataError, ZooError
from zoo.explain import head_statistics
from zoo.registry import model_class

FAMILIES = list({model_class(name): name for name in reversed(SMALL)}.values())
EACH = pytest.mark.parametrize("name", FAMILIES)
CLASSES = ["cat", "dog", "owl"]
PICTURES = {"attention.png", "class.png", "rollout.png"}
pytestmark = pytest.mark.filterwarnings("ignore:The official weights:UserWarning")


def zoo(*arguments: object) -> str:
    """What `zoo explain` prints; a ZooError is raised as it is."""
    return command_line.zoo("explain", *arguments, columns=200)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = {"embed_dims": [8, 8], "depths": [2, 1], "head_dim": 4, "n_win": 2}
    model = settled(library.create_model("vision/biformer_digits", num_classes=3, **small))
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    facts = {"classes": CLASSES, "preprocessing": asdict(Preprocessing.of(model, size=[32, 40]))}
    library.save_model(model, path, extra=facts)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folders(tmp_path_factory.mktemp("photos"), {"red": 1, "blue": 1})
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


# ---- recordings --------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("size", [(96, 96), (97, 131)])
def test_tokens_of_every_family_are_found_on_the_image(name: str, size: tuple[int, int]) -> None:
    model, x = build(name), images(1, 3, *size)
    if isinstance(model, InLineDeiT | InLinePVT):
        with pytest.raises(AttentionError, match=r"none of its modules called zoo\.attention\.attend"):
            record(model, x)
        return
    recording = record(model, x, target=2)
    torch.testing.assert_close(recording.probabilities, model(x)[0].softmax(-1))
    assert recording.layers
    for layer in recording.layers:
        if layer.places is None:  # channels, and shuffled tokens
            assert isinstance(model, DaViT | SReT)
            continue
        found, places = layer.maps[0], layer.places[0]
        assert places[0].cells.shape[1] == found.sizes[2]
        assert places[1].cells.shape[1] == found.sizes[3]
        seen, keys = layer.seen((0.5, 0.5))
        relevant, _ = layer.relevance()
        assert seen.shape == relevant.shape == keys.grid
        assert 0 < float(seen.sum()) <= 1.001
        assert (relevant >= 0).all()
        assert (head_statistics(found, places, size).entropy >= 0).all()


def test_a_query_sees_its_routed_regions_alone() -> None:
    model = build("biformer_tiny")
    (layer,) = record(model, images(1), layers=["stages.1.1.attn"]).layers
    assert layer.name == "stages.1.1.attn"
    routed, (seen, places) = layer.routed, layer.seen((0.8, 0.2))
    assert routed is not None
    assert places.grid == (12, 12)
    regions = seen.view(2, 6, 2, 6).sum((1, 3)).flatten()
    chosen = routed.index[0, 2]  # the lower left of 2 x 2
    assert set(regions.nonzero().flatten().tolist()) == set(chosen.tolist())
    torch.testing.assert_close(seen.flatten(), layer.maps[0].weights[0, :, 9 * 12 + 2].mean(0).detach())


def test_a_query_sees_its_window_in_the_mean_of_the_heads() -> None:
    layer = record(build("efficientvit_m0", img_size=224), images(1, 3, 224, 224)).layers[0]
    assert layer.num_heads == 2
    assert len(layer.maps) == 2
    seen, places = layer.seen((0.1, 0.9))
    assert places.grid == (14, 14)
    rows, columns = seen.nonzero().T
    assert (int(rows.max()), int(columns.min())) == (6, 7)
    torch.testing.assert_close(seen.sum(), torch.tensor(1.0))


def test_relevance_is_the_positive_part_of_weight_times_gradient() -> None:
    model, x = build("biformer_tiny"), images(1)
    layer = record(model, x, target=1).layers[-1]
    relevant, _ = layer.relevance()
    found = layer.maps[0]
    expected = (found.weights * found.grad).clamp(min=0).sum((0, 1, 2))
    torch.testing.assert_close(relevant.flatten(), expected.detach())
    assert float(expected.detach().sum()) > 0


def test_gates_of_lwganet_are_maps_between_0_and_1() -> None:
    recording = record(build("lwganet_l0"), images(1))
    assert {name.rpartition(".")[2] for name in recording.gates} == {"point", "medium", "far"}
    assert all(map.ndim == 2 and 0 <= map.min() <= map.max() <= 1 for map in recording.gates.values())


# ---- the verb ----------------------------------------------------------------------------------------------


def test_a_folder_is_explained_and_damaged_files_are_counted(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    output = zoo(f"checkpoint={checkpoint}", f"input={photos}", f"output={tmp_path}")
    assert "Skipped:" in output
    assert "broken.jpg" in output
    assert "1 of 3 images could not be read" in output
    for name in ("red/red_0", "blue/blue_0"):
        drawn = {file.name for file in (tmp_path / name).iterdir()}
        assert drawn == PICTURES | {"routing.png"}
        for file in (tmp_path / name).iterdir():
            assert str(file) in output
            assert min(Image.open(file).size) > 200
    with open(tmp_path / "statistics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows} == {"red/red_0", "blue/blue_0"}
    assert {row["layer"] for row in rows} == {"stages.0.0.attn", "stages.0.1.attn", "stages.1.1.attn"}
    assert all(0 < float(row["distance_px"]) < 52 for row in rows)
    assert all(1 <= float(row["effective_keys"]) <= int(row["keys"]) for row in rows)
    facts = json.loads((tmp_path / "explanation.json").read_text())["images"]["red/red_0"]
    assert facts["class"] in CLASSES
    assert facts["layers"] == facts["drawn"]


def test_layers_query_and_class_can_be_chosen(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    image = photos / "red" / "red_0.png"
    zoo(
        f"checkpoint={checkpoint}",
        f"input={image}",
        f"output={tmp_path}",
        "layer=stages.1",
        "query=[0.2,0.9]",
        "target=owl",
    )
    facts = json.loads((tmp_path / "explanation.json").read_text())
    assert facts["query"] == [0.2, 0.9]
    assert facts["images"]["red_0"]["layers"] == ["stages.1.1.attn"]
    assert facts["images"]["red_0"]["class"] == "owl"


def test_an_official_file_is_explained_by_the_name_of_its_model(photos: Path, tmp_path: Path) -> None:
    model = library.create_model("vision/lwganet_l0")
    torch.save(library.to_official(model), tmp_path / "official.pth")
    output = zoo(
        "model=lwganet_l0",
        f"checkpoint={tmp_path / 'official.pth'}",
        f"input={photos / 'red' / 'red_0.png'}",
        f"output={tmp_path / 'out'}",
        "panels=2",
        "target=7",
        "layer=stages.3",
    )
    assert "gates.png" in output
    facts = json.loads((tmp_path / "out" / "explanation.json").read_text())["images"]["red_0"]
    assert facts["class"] == "class 7"


def test_a_file_names_the_classes(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("oak\nelm\nash\n")
    given = (f"checkpoint={checkpoint}", f"input={photos}/*/*.png", f"output={tmp_path / 'out'}")
    zoo(*given, f"classes={tmp_path / 'names.txt'}", "target=elm", "panels=1")
    facts = json.loads((tmp_path / "out" / "explanation.json").read_text())["images"]
    assert {entry["class"] for entry in facts.values()} == {"elm"}
    assert set(facts) == {"red_0", "blue_0"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layer=stages.1.1.atn", r"layer=stages.1.1.atn.*Did you mean 'stages.1.1.attn'"),
        ("layer=[stages.0,stem]", r"stages.0.0.attn"),
        ("layer=stem", "modules=.*match none of stages.0.0.attn"),
        ("target=cta", "target=cta: there is no such class. Did you mean 'cat'"),
        ("target=7", "target=7: the model has classes 0 to 2"),
        ("query=top", "query=top: write centre"),
        ("query=[0.5,1.5]", "as shares of height and width"),
        ("input=null", "needs images: input=FILE"),
        ("input=missing.png", r"missing\.png is no file or folder"),
        ("outptu=x", "'outptu'.*'output'"),
        ("checkpoint=null", "either run=RUN or checkpoint=FILE"),
    ],
)
def test_mistakes_are_named(
    override: str, message: str, checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    key = override.partition("=")[0]
    given = {"checkpoint": checkpoint, "input": photos / "red" / "red_0.png", "output": tmp_path}
    arguments = [f"{name}={value}" for name, value in given.items() if name != key]
    if override == "layer=[stages.0,stem]":
        zoo(*arguments, override)  # what attends inside of any of them
        assert message in (tmp_path / "statistics.csv").read_text()
        return
    with pytest.raises(ZooError, match=message):
        zoo(*arguments, override)


def test_a_damaged_file_and_a_folder_without_images_are_told(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read as an image"):
        zoo(f"checkpoint={checkpoint}", f"input={photos / 'broken.jpg'}", f"output={tmp_path}")
    with pytest.raises(DataError, match="has no images"):
        zoo(f"checkpoint={checkpoint}", f"input={tmp_path}", f"output={tmp_path}")


def test_a_domain_without_explain_says_so(tmp_path: Path) -> None:
    library.save_model(library.create_model("stid", num_nodes=3), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="'traffic' has no explain"):
        zoo(f"checkpoint={tmp_path / 'model.safetensors'}", "input=x.png")


def test_names_of_images_that_differ_in_their_suffix_stay_apart(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for suffix in ("png", "jpg"):
        picture("red", 0).save(tmp_path / "in" / f"a.{suffix}")
    zoo(f"checkpoint={checkpoint}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "panels=1")
    assert {folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir()} == {"a_png", "a_jpg"}
