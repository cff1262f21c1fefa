"""Pairs: layouts, sizes, crops, the embedded photographs, and folders made by the exact rule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from sr_small import smooth, write, write_many
from typer.testing import CliRunner

from domains.superres import sources
from domains.superres.data import SuperresData
from domains.superres.images import read_rgb
from domains.superres.resize import degrade, modcrop
from domains.superres.sources import PHOTOGRAPHS, find_layout, photographs
from zoo.cli.data import data_app
from zoo.errors import ConfigError, DataError, MissingExtra


def used(scale: int = 2, stage: str = "fit", **options: Any) -> SuperresData:
    """Data bound to a model of this scale."""
    data = SuperresData(**({"patch": 8, "steps": 2, "batch_size": 3} | options))
    data.setup(stage)
    data.use(scale)
    return data


def names(data: SuperresData) -> dict[str, list[str]]:
    return {part: [pair.name for pair in store.pairs] for part, store in data.stores.items()}


def paired(folder: Path, count: int = 4, scale: int = 2, size: tuple[int, int] = (41, 46)) -> dict[str, Path]:
    """Folders `hr` and `lr` of pictures with low resolution of the exact rule."""
    write_many(folder / "hr", count, size)
    for i in range(count):
        write(folder / "lr" / f"p{i}x{scale}.png", degrade(smooth(*size, seed=i), scale))
    return {"hr": folder / "hr", "lr": folder / "lr"}


# ---- the embedded photographs ------------------------------------------------------------------------------


def test_no_photograph_is_in_two_parts() -> None:
    files = [file for wheels in PHOTOGRAPHS.values() for group in wheels.values() for file in group]
    assert len(files) == len(set(files))
    found = photographs()
    assert {part: len(pairs) for part, pairs in found.items()} == {"train": 13, "val": 1, "test": 3}
    assert all(min(read_rgb(pair.hr).shape[:2]) >= 256 for pair in found["test"])


def test_without_scikit_image_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install scikit-image.*data=folder"):
        photographs()


# ---- crops -------------------------------------------------------------------------------------------------


def test_crops_are_pairs_of_the_same_place(tmp_path: Path) -> None:
    """Without noise in the way: high resolution, reduced by the mean, is near low resolution."""
    data = used(path=write_many(tmp_path, 3), name="folder")
    batch = data.collate([data.train_set[i] for i in range(6)])
    assert batch["lr"].shape == (6, 3, 8, 8)
    assert batch["hr"].shape == (6, 3, 16, 16)
    reduced = torch.nn.functional.avg_pool2d(batch["hr"], 2)
    assert float((reduced - batch["lr"]).abs().max()) < 0.05


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    folder = write_many(tmp_path, 3)
    first, second = used(name="folder", path=folder), used(name="folder", path=folder)
    torch.testing.assert_close(first.train_set[3], second.train_set[3])
    second.train_set.set_epoch(1)
    assert not torch.equal(first.train_set[3]["lr"], second.train_set[3]["lr"])
    other = used(name="folder", path=folder, seed=1)
    assert not torch.equal(first.train_set[3]["lr"], other.train_set[3]["lr"])


def test_all_eight_turns_occur_and_none_without_augmentation(tmp_path: Path) -> None:
    write_many(tmp_path, 3, (16, 16))
    data = used(name="folder", path=tmp_path, steps=60)
    crops = {data.train_set[i]["hr"].numpy().tobytes() for i in range(180)}
    assert len(crops) == 8
    plain = used(name="folder", path=tmp_path, steps=60, augment=False)
    assert len({plain.train_set[i]["hr"].numpy().tobytes() for i in range(180)}) == 1


def test_of_several_candidates_the_most_detailed_is_taken(tmp_path: Path) -> None:
    half = np.zeros((64, 128, 3), np.uint8)
    half[:, 64:] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for i in range(3):
        write(tmp_path / f"p{i}.png", half)

    def flat(candidates: int) -> int:
        data = used(name="folder", path=tmp_path, steps=20, candidates=candidates)
        return sum(float(data.train_set[i]["hr"].std()) < 0.01 for i in range(60))

    assert flat(1) > 10
    assert flat(4) < flat(1) / 2


def test_memory_and_disk_give_the_same_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    folder = write_many(tmp_path / "pictures", 3)
    memory, disk = (used(name="folder", path=folder, cache=cache) for cache in ("memory", "disk"))
    torch.testing.assert_close(memory.train_set[1], disk.train_set[1])
    assert isinstance(disk.stores["train"].get(0)[1], np.memmap)
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == 2
    write(folder / f"{disk.stores['train'].pairs[0].name}.png", smooth(50, 60, seed=9))
    assert used(name="folder", path=folder, cache="disk").stores["train"].get(0)[1].shape == (50, 60, 3)


def test_whole_pictures_are_cropped_to_what_low_resolution_covers(tmp_path: Path) -> None:
    data = used(3, **paired(tmp_path, scale=3), name="paired", patch=4)
    for i in range(len(data.test_set)):
        sample = data.test_set[i]
        assert sample["lr"].shape == (3, 13, 15)
        assert sample["hr"].shape == (3, 39, 45)
        assert sample["hr"].dtype == torch.uint8


def test_pictures_of_any_size_are_a_batch(tmp_path: Path) -> None:
    write(tmp_path / "a.png", smooth(30, 20))
    write(tmp_path / "b.png", smooth(41, 33))
    data = used(name="folder", path=tmp_path, stage="test")
    batches = list(data.test_dataloader())
    assert [sample["hr"].shape for (sample,) in batches] == [(3, 30, 20), (3, 40, 32)]
    assert data.batch_size == 3


# ---- layouts -----------------------------------------------------------------------------------------------


def test_a_plain_folder_is_split_by_picture(tmp_path: Path) -> None:
    folder = write_many(tmp_path, 10)
    found = names(used(name="folder", path=folder))
    assert {part: len(pairs) for part, pairs in found.items()} == {"train": 8, "val": 1, "test": 1}
    assert sorted(name for part in found.values() for name in part) == sorted(f"p{i}" for i in range(10))
    assert found == names(used(name="folder", path=folder))
    assert found != names(used(name="folder", path=folder, split_seed=1))
    other = names(used(name="folder", path=folder, split=[0.5, 0.2, 0.3]))
    assert {part: len(pairs) for part, pairs in other.items()} == {"train": 5, "val": 2, "test": 3}


def test_div2k_and_flickr2k_are_known(tmp_path: Path) -> None:
    write_many(tmp_path / "DIV2K" / "DIV2K_train_HR", 2)
    write_many(tmp_path / "DIV2K" / "DIV2K_valid_HR", 1)
    write_many(tmp_path / "Flickr2K" / "Flickr2K_HR", 1)
    for i in range(2):
        small = degrade(smooth(40, 44, seed=i), 2)
        write(tmp_path / "DIV2K" / "DIV2K_train_LR_bicubic" / "X2" / f"p{i}x2.png", small)
    data = used(name="folder", path=tmp_path)
    assert names(data) == {"train": ["DIV2K/p0", "DIV2K/p1", "Flickr2K/p0"], "val": ["p0"], "test": ["p0"]}
    assert [pair.lr is not None for pair in data.stores["train"].pairs] == [True, True, False]
    assert {pair.lr for pair in used(3, name="folder", path=tmp_path).stores["train"].pairs} == {None}


def test_a_benchmark_set_is_known_alone_and_beside_others(tmp_path: Path) -> None:
    for name in ("Set5", "Set14"):
        write_many(tmp_path / name / "HR", 2)
        for i in range(2):
            write(tmp_path / name / "LR_bicubic" / "X2" / f"p{i}x2.png", degrade(smooth(40, 44, seed=i), 2))
    alone = used(name="folder", path=tmp_path / "Set5", stage="test")
    assert names(alone)["test"] == ["p0", "p1"]
    both = used(name="folder", path=tmp_path, stage="test")
    assert names(both)["test"] == ["Set14/p0", "Set14/p1", "Set5/p0", "Set5/p1"]
    assert {pair.group for pair in both.stores["test"].pairs} == {"Set5", "Set14"}


def test_set5_is_read_as_it_is_published(shared_data: Path) -> None:
    data = used(3, name="folder", path=shared_data / "superres" / "Set5", stage="test")
    assert names(data)["test"] == ["baby", "bird", "butterfly", "head", "woman"]
    sample = data.test_set[2]
    assert sample["hr"].shape == (3, 255, 255)
    made = degrade(read_rgb(data.stores["test"].pairs[2].hr), 3)
    np.testing.assert_array_equal(np.round(sample["lr"].numpy() * 255), made.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["{}.png", "{}x2.png", "{}_LRBI_x2.png", "X2/{}x2.png", "x2/{}.webp"])
def test_low_resolution_files_are_found_by_their_usual_names(name: str, tmp_path: Path) -> None:
    write_many(tmp_path / "hr", 3)
    for i in range(3):
        write(tmp_path / "lr" / name.format(f"p{i}"), degrade(smooth(40, 44, seed=i), 2))
    data = used(name="paired", hr=tmp_path / "hr", lr=tmp_path / "lr")
    assert all(pair.lr is not None for store in data.stores.values() for pair in store.pairs)


def test_grey_originals_are_repeated(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"p{i}.png", smooth(30, 30, 1, seed=i))
    sample = used(name="folder", path=tmp_path).test_set[0]
    assert torch.equal(sample["hr"][0], sample["hr"][2])


# ---- what cannot be used -----------------------------------------------------------------------------------


def test_sizes_that_do_not_match_are_named(tmp_path: Path) -> None:
    folders = paired(tmp_path)
    write(tmp_path / "lr" / "p2x2.png", smooth(13, 15))
    with pytest.raises(DataError, match=r"p2x2\.png has 15x13 pixels; .*p2\.png of 46x41, .*has 23x20"):
        used(name="paired", **folders)


def test_a_missing_partner_is_named(tmp_path: Path) -> None:
    folders = paired(tmp_path)
    (tmp_path / "lr" / "p1x2.png").unlink()
    with pytest.raises(DataError, match=r"1 of 4 originals have no x2 picture in .*lr: p1\.png"):
        used(name="paired", **folders)


@pytest.mark.parametrize("broken", ["hr/p1.png", "lr/p1x2.png"])
def test_corrupt_files_are_named_or_left_out(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = paired(tmp_path)
    content = (tmp_path / broken).read_bytes()
    (tmp_path / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"1 pictures cannot be used: .*p1.*data\.corrupt=skip"):
        used(name="paired", **folders)
    data = used(name="paired", **folders, corrupt="skip")
    assert sum(len(store) for store in data.stores.values()) == 3
    assert "Left out: 1 pictures cannot be used" in capsys.readouterr().out


def test_a_picture_smaller_than_a_crop_is_named(tmp_path: Path) -> None:
    write_many(tmp_path, 9)
    write(tmp_path / "small.png", smooth(14, 40))
    with pytest.raises(DataError, match=r"small\.png has 20x7 pixels .*data\.patch=8"):
        used(name="folder", path=tmp_path, split=[0.8, 0.1, 0.1], split_seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fotos"}, "data.name=fotos is not one of .* Did you mean 'photos'"),
        ({"cache": "ram"}, "data.cache=ram is not one of"),
        ({"scale": 5}, "data.scale=5: pictures are enlarged 2, 3 or 4 times"),
        ({"patch": 0}, "data.patch=0: at least 1"),
        ({"border": -1}, "data.border=-1: at least 0"),
        ({"name": "folder"}, "data=folder needs data.path"),
        ({"name": "paired"}, "data=paired needs data.hr=DIR and data.lr=DIR"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SuperresData(**options).setup()


def test_places_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*gone is no folder"):
        used(name="folder", path=tmp_path / "gone")
    with pytest.raises(DataError, match="There are no pictures in"):
        used(name="folder", path=tmp_path)
    write_many(tmp_path / "hr", 2)
    with pytest.raises(DataError, match=r"data\.lr=.*gone is no folder"):
        used(name="paired", hr=tmp_path / "hr", lr=tmp_path / "gone")
    with pytest.raises(DataError, match="2 pictures cannot be split in 3 parts"):
        used(name="folder", path=tmp_path / "hr")
    with pytest.raises(ConfigError, match=r"data\.split=\[0.5, 0.5\]: write three shares"):
        used(name="folder", path=tmp_path / "hr", split=[0.5, 0.5])


def test_another_scale_than_that_of_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.scale=4, but the model enlarges x2"):
        SuperresData("folder", write_many(tmp_path, 3), scale=4).use(2)


# ---- zoo data ----------------------------------------------------------------------------------------------


def zoo_data(*arguments: object) -> str:
    result = CliRunner().invoke(data_app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_degrade_writes_the_exact_rule_in_the_layout_of_the_field(tmp_path: Path) -> None:
    write_many(tmp_path / "hr" / "inner", 2, (41, 46))
    printed = zoo_data("degrade", tmp_path / "hr", tmp_path / "lr", "scale=[2,3]")
    assert str(tmp_path / "lr" / "X3") in printed
    for scale in (2, 3):
        found = np.asarray(Image.open(tmp_path / "lr" / f"X{scale}" / "inner" / f"p1x{scale}.png"))
        np.testing.assert_array_equal(found, degrade(smooth(41, 46, seed=1), scale))
    data = used(3, name="paired", hr=tmp_path / "hr", lr=tmp_path / "lr", stage="test", patch=4)
    assert len(data.test_set) == 2


def test_degrade_makes_set5_as_published(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "superres" / "Set5"
    zoo_data("degrade", folder / "HR", tmp_path)
    for published in (folder / "LR_bicubic").rglob("*.png"):
        made = tmp_path / published.relative_to(folder / "LR_bicubic")
        np.testing.assert_array_equal(read_rgb(made), read_rgb(published))


def test_degrade_names_what_it_could_not_reduce_and_does_the_rest(tmp_path: Path) -> None:
    write_many(tmp_path / "hr", 1)
    write(tmp_path / "hr" / "thin.png", smooth(3, 40))
    (tmp_path / "hr" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 files were not reduced: .*broken\.png.*thin\.png"):
        zoo_data("degrade", tmp_path / "hr", tmp_path / "lr", "scale=4")
    assert [file.name for file in (tmp_path / "lr" / "X4").iterdir()] == ["p0x4.png"]


@pytest.mark.parametrize(
    ("option", "message"), [("scale=1", "scale=1"), ("name=same", "name of the original")]
)
def test_degrade_refuses_what_cannot_be(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo_data("degrade", write_many(tmp_path / "hr", 1), tmp_path / "lr", option)


def test_info_tells_the_folders_of_a_layout(tmp_path: Path) -> None:
    write_many(tmp_path / "DIV2K_train_HR", 2)
    write(tmp_path / "DIV2K_train_LR_bicubic" / "X2" / "p0x2.png", smooth(20, 22))
    printed = zoo_data("info", tmp_path, "--domain", "superres")
    for fact in ("DIV2K_train_HR", "44x40", "X2"):
        assert fact in printed
    assert find_layout(tmp_path).keys() == {"train"}


def test_cropping_keeps_a_multiple() -> None:
    assert modcrop(smooth(41, 46), 4).shape == (40, 44, 3)


@pytest.mark.parametrize(("count", "judged"), [(4, [2, 2]), (3, [3, 3])])
def test_processes_share_the_pictures_to_judge_or_each_judge_all(
    count: int, judged: list[int], tmp_path: Path
) -> None:
    data = used(name="folder", path=write_many(tmp_path, count), stage="test")
    found = []
    for rank in range(2):
        data.trainer = cast(Any, SimpleNamespace(global_rank=rank, world_size=2))
        found.append([sample["index"] for (sample,) in data.test_dataloader()])
    assert [len(indices) for indices in found] == judged
    assert set(found[0]) | set(found[1]) == set(range(count))
