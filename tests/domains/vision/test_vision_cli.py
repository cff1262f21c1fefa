"""`zoo train`, `evaluate` and `predict` on small images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from command_line import QUIET, zoo
from pictures import folders, picture

import zoo as library
from domains.vision.task import VisionTask
from zoo.errors import CheckpointError, ConfigError, DataError, ZooError
from zoo.weights.checkpoint import load_model, save_model, save_state_dict

SMALL = (
    "model=biformer_digits",
    "model.embed_dims=[8,8]",
    "model.depths=[1,1]",
    "model.head_dim=4",
    "model.n_win=2",
    "data.size=16",
    "data.mean=0.5",
    "data.batch_size=7",
    "data.num_workers=0",
    "trainer.max_epochs=2",
    "optimizer.lr=0.01",
    "schedule.name=constant",
)
MIXED = ("aug=imagenet", "data.augment.mixup=0.2", "ema.decay=0.9")


def train(images: Path, run: Path, *more: str) -> str:
    source = ("data=imagefolder", f"data.path={images}")
    return zoo("train", "domain=vision", *source, *SMALL, *QUIET, f"run_dir={run}", *more)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders(tmp_path_factory.mktemp("images"), {"red": 12, "green": 12, "blue": 11})


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, train(images, run)


@pytest.fixture
def run(trained: tuple[Path, str]) -> Path:
    return trained[0]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def outcome(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("metrics.csv", "results.json", "model.safetensors")}


def test_training_reports_itself_beside_baselines_and_draws(trained: tuple[Path, str]) -> None:
    run, output = trained
    report = results(run)
    assert report["images"] == {"train": 26, "val": 3, "test": 6}
    assert set(report["accuracy"]) >= {"biformer_digits", "nearest neighbour on 16x16 pixels"}
    assert sum(map(sum, report["confusion"])) == 6
    assert list(report["classes"]) == ["blue", "green", "red"]
    assert "best baseline" in output
    assert "precision" in output
    assert {f.name for f in (run / "plots").iterdir()} >= {"confusion.png", "training.png"}


def test_weights_carry_classes_and_preprocessing(run: Path) -> None:
    _, facts = load_model(run / "model.safetensors")
    assert facts["classes"] == ["blue", "green", "red"]
    assert facts["preprocessing"]["size"] == [16, 16]


def test_same_seed_same_bytes_and_resumed_as_uninterrupted(images: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(images, tmp_path / name, "plots=false", *MIXED)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    train(images, tmp_path / "cut", "plots=false", *MIXED, "trainer.max_epochs=1")
    zoo("train", f"resume={tmp_path / 'cut'}", "trainer.max_epochs=2", "data.num_workers=1")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "one")


def test_a_run_is_evaluated_on_its_own_test_part(run: Path, tmp_path: Path) -> None:
    zoo("evaluate", f"run={run}", f"output={tmp_path}")
    assert results(tmp_path) == results(run)


def test_a_folder_of_some_classes_is_evaluated_by_name(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "red", tmp_path / "new" / "red")
    output = zoo(
        "evaluate",
        f"checkpoint={run / 'model.safetensors'}",
        "data=imagefolder",
        f"data.path={tmp_path / 'new'}",
        f"output={tmp_path / 'out'}",
    )
    report = results(tmp_path / "out")
    assert report["images"]["test"] == report["classes"]["red"]["images"] == 12
    assert report["classes"]["blue"]["images"] == 0
    assert "nearest neighbour" not in output
    assert (tmp_path / "out" / "plots" / "confusion.png").is_file()


def test_a_class_that_the_weights_do_not_know_is_named(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "red", tmp_path / "redd")
    with pytest.raises(CheckpointError, match=r"does not know 1 of the 1 classes.*'redd'.*'red'"):
        zoo("evaluate", f"run={run}", "data=imagefolder", f"data.path={tmp_path}")


def test_a_folder_of_images_becomes_a_table_and_a_sheet(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "photos")
    (tmp_path / "photos" / "broken.jpg").write_text("no image")
    output = zoo(
        "predict",
        f"run={run}",
        f"input={tmp_path / 'photos'}",
        f"output={tmp_path / 'labels.csv'}",
        f"plots={tmp_path / 'plots'}",
        "topk=2",
        "batch_size=8",
    )
    table = pd.read_csv(tmp_path / "labels.csv")
    assert list(table.columns) == ["path", "label", "probability", "label_2", "probability_2"]
    assert len(table) == 35
    assert (table["probability"] >= table["probability_2"]).all()
    assert "Left out 1 of 36 files" in output
    assert "broken.jpg" in output
    assert (tmp_path / "plots" / "labels.png").is_file()


def test_predictions_are_those_of_the_test(run: Path, images: Path, tmp_path: Path) -> None:
    zoo("predict", f"run={run}", f"input={images}", f"output={tmp_path / 'all.parquet'}", "batch_size=5")
    table = pd.read_parquet(tmp_path / "all.parquet").set_index("path")["label"]
    zoo(
        "evaluate",
        f"run={run}",
        "data=imagefolder",
        f"data.path={images}",
        f"output={tmp_path}",
        "plots=false",
    )
    right = sum(Path(str(path)).parent.name == label for path, label in table.items())
    assert results(tmp_path)["accuracy"]["biformer_digits"] == pytest.approx(right / 35, abs=1e-6)


def test_official_weights_predict_numbers_or_names_of_a_file(tmp_path: Path) -> None:
    model = library.create_model("biformer_digits", num_classes=4)
    save_state_dict(library.to_official(model), tmp_path / "official.pth")
    picture("red", 0, (240, 300)).save(tmp_path / "photo.jpg")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    given = (
        "model=biformer_digits",
        f"checkpoint={tmp_path / 'official.pth'}",
        f"input={tmp_path / 'photo.jpg'}",
    )
    table = tmp_path / "labels.csv"
    zoo("predict", *given, f"output={table}")
    assert set(pd.read_csv(table, dtype=str).filter(regex="label").iloc[0]) == set("0123")
    zoo("predict", *given, f"output={table}", f"classes={tmp_path / 'names.txt'}")
    assert set(pd.read_csv(table).filter(regex="label").iloc[0]) == set("abcd")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="has 2 lines; the model tells 4 classes apart"):
        zoo("predict", *given, f"output={table}", f"classes={tmp_path / 'names.txt'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("input=nowhere",), "is no file or folder"),
        ((), "needs images"),
        (("input=.", "output=labels.txt"), r"must be \.csv or \.parquet"),
        (("input=.", "device=gpu"), "device=gpu is not known"),
        (("input=.", "topk=0"), "at least 1"),
        (("input=.", "backtest=true"), "'backtest'"),
    ],
)
def test_mistakes_in_predict_are_named(
    arguments: tuple[str, ...], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture("red", 0).save("a.png")
    with pytest.raises(ZooError, match=message):
        zoo("predict", f"run={run}", *arguments)


def test_data_info_tells_what_training_would_see(images: Path) -> None:
    output = zoo("data", "info", images, "split=[0.5,0.25,0.25]", "--domain", "vision")
    assert "17 train, 9 val, 9 test" in output
    assert "green" in output
    with pytest.raises(ConfigError, match="'split'"):
        zoo("data", "info", images, "splits=1", "--domain", "vision")
    with pytest.raises(ConfigError, match="nothing to make"):
        zoo("data", "make", "vision")


def test_features_have_no_labels(tmp_path: Path) -> None:
    model = library.create_model("biformer_digits", num_classes=0)
    save_model(model, tmp_path / "m.safetensors", extra=VisionTask.facts_of(model))
    picture("red", 0).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no classifier"):
        zoo("predict", f"checkpoint={tmp_path / 'm.safetensors'}", f"input={tmp_path / 'a.png'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data=imagefolder",), r"data=imagefolder needs data\.path"),
        (("data=imagefolder", "data.path=nowhere"), "There is no folder nowhere"),
        (("data.corrupt=ignore",), "one of error, skip"),
        (("data.augment.aa=rnd-m9",), r"data\.augment"),
        (("loss.label_smoothing=2",), "label_smoothing"),
        (("loss.null_value=0",), "null_value"),
        (("model=gman",), "gman is for domain=traffic"),
        (("data=simulated",), "for another domain"),
        (("checkpointing.monitor=val/top3",), "val/top1"),
    ],
)
def test_mistakes_in_train_are_named(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=message):
        zoo(
            "train",
            "domain=vision",
            *QUIET,
            "trainer.max_epochs=1",
            "trainer.limit_train_batches=1",
            "trainer.limit_val_batches=1",
            f"run_dir={tmp_path / 'run'}",
            *arguments,
        )
