"""Which files of a folder hold which part: the layouts in which annotated images are passed on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domains.detection.annotations import Collection
from domains.detection.sources.coco import load_json, read_coco
from domains.detection.sources.labelme import read_labelme
from domains.detection.sources.openmmlab import read_mmdet
from domains.detection.sources.text import read_text
from domains.detection.sources.voc import read_voc
from domains.detection.sources.yolo import read_description, read_yolo
from zoo.errors import ConfigError, DataError

PARTS = ("train", "val", "test")
FOLDERS = {"train": ("train",), "val": ("valid", "val", "validation"), "test": ("test",)}
"""What folders of the parts are called."""
ROBOFLOW = "_annotations.coco.json"


def read_parts(
    name: str,
    path: Path | None,
    *,
    files: Mapping[str, Path] | None = None,
    images: Path | None = None,
    keypoints: bool = False,
    images_needed: bool = True,
) -> dict[str, Collection]:
    """The parts of a data set; `all` where it has none.

    Args:
        name: `coco` (also CrowdPose and Roboflow's export), `yolo`, `voc`, `labelme` or `mmdet`.
        path: its folder, or one file of annotations; of `mmdet` a config.
        files: instead, COCO json by part.
        images: the folder of images, where it is none of the usual.
        keypoints: read keypoints rather than boxes alone.
        images_needed: refuse COCO json whose images are nowhere.

    Raises:
        ConfigError: nothing to read from was given.
        DataError: the folder has no known layout, or its files cannot be used.
    """
    if files:
        if name != "coco":
            raise ConfigError("data.train, data.val and data.test name json files of data=coco.")
        return {part: _coco(file, images, keypoints, images_needed) for part, file in files.items()}
    if path is None:
        raise ConfigError(f"data={name} needs data.path={'CONFIG.py' if name == 'mmdet' else 'FOLDER'}.")
    if not path.exists():
        raise DataError(f"There is no {path}.")
    if name == "coco":
        found = {"all": path} if path.is_file() else _coco_files(path, keypoints)
        return {part: _coco(file, images, keypoints, images_needed) for part, file in found.items()}
    if name == "labelme":
        return read_labelme(_labelme_files(path), images, keypoints=keypoints)
    if name == "mmdet":
        return read_mmdet(path, keypoints=keypoints)
    return _yolo(path, keypoints) if name == "yolo" else _voc(path, keypoints)


# ---- COCO --------------------------------------------------------------------------------------------------


def _coco_files(path: Path, keypoints: bool) -> dict[str, Path]:
    """Annotation file by part."""
    found: dict[str, Path] = {}
    for part, folders in FOLDERS.items():
        candidates = [path / folder / ROBOFLOW for folder in folders]
        for stem in _stems(keypoints):
            for folder in ("annotations", "json"):
                candidates += sorted((path / folder).glob(f"{stem}{part}*.json"))
        if part == "train":
            candidates += sorted((path / "json").glob("crowdpose_trainval.json"))
        existing = [file for file in candidates if file.is_file() and "trainval" not in file.stem]
        existing = existing or [file for file in candidates if file.is_file()]
        if existing:
            found[part] = existing[0]
    single = path / ROBOFLOW
    if not found and single.is_file():
        found["all"] = single
    if not found:
        what = "person_keypoints" if keypoints else "instances"
        raise DataError(
            f"{path} has no layout of COCO that is known: annotations/{what}_train2017.json, "
            f"json/crowdpose_train.json, or train/{ROBOFLOW}. Name files by data.train=FILE.json "
            "data.val=FILE.json data.images=FOLDER, or one by data.path=FILE.json."
        )
    return found


def _stems(keypoints: bool) -> tuple[str, ...]:
    """Beginnings of file names, the likeliest first."""
    return ("person_keypoints_", "crowdpose_", "") if keypoints else ("instances_", "", "crowdpose_")


def _coco(file: Path, images: Path | None, keypoints: bool, images_needed: bool) -> Collection:
    return read_coco(file, images or _image_folder(file, images_needed), keypoints=keypoints)


def _image_folder(file: Path, needed: bool) -> Path:
    """Where the first image of a json file lies, among the usual places.

    Raises:
        DataError: nowhere.
    """
    content = load_json(file)
    try:
        first = content["images"][0]["file_name"]
    except (IndexError, KeyError, TypeError):
        first = None
    if not isinstance(first, str):
        return file.parent  # `read_coco` says what is wrong with the file
    root = file.parent.parent
    stem = file.stem.rpartition("_")[2]
    places = (root / stem, root / "images" / stem, root / "images", file.parent, file.parent / "images", root)
    for place in places:
        if (place / first).is_file():
            return place
    if not needed:
        return file.parent
    shown = ", ".join(str(place) for place in places)
    raise DataError(f"{file}: its image {first} is in none of {shown}. Set data.images=FOLDER.")


# ---- YOLO --------------------------------------------------------------------------------------------------


def _yolo(path: Path, keypoints: bool) -> dict[str, Collection]:
    files = [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if not files:
        raise DataError(
            f"{path} has no data.yaml, which names the classes (names) and the parts (train, val)."
        )
    file = files[0]
    description = read_description(file)
    found = {}
    for part, names in FOLDERS.items():
        given = next((description[name] for name in names if description.get(name)), None)
        folders = _yolo_folders(file, description, given)
        if folders:
            found[part] = read_yolo(folders[0], description, keypoints=keypoints, where=str(file))
    if not found:
        raise DataError(f"{file}: neither train nor val name a folder of images that is there.")
    return found


def _yolo_folders(file: Path, description: Mapping[str, Any], given: Any) -> list[Path]:
    """Where `train: images/train` may be: from `path`, from the yaml file, or as Roboflow writes it."""
    if given is None:
        return []
    if not isinstance(given, str):
        raise DataError(f"{file}: a part is one folder, not {given}.")
    base = file.parent
    roots = [base / str(description.get("path") or "."), base]
    places = [root / given for root in roots] + [base / given.removeprefix("../")]
    found = [place for place in places if place.exists()]
    if not found:
        raise DataError(f"{file} names {given}, which is at none of {', '.join(map(str, places))}.")
    return found


# ---- Pascal VOC --------------------------------------------------------------------------------------------


def _voc(path: Path, keypoints: bool) -> dict[str, Collection]:
    if keypoints:
        raise ConfigError("Pascal VOC has no keypoints: data.keypoints=false.")
    roots = [path, *sorted(path.glob("VOC*")), *sorted(path.glob("VOCdevkit/VOC*"))]
    root = next((folder for folder in roots if (folder / "Annotations").is_dir()), None)
    files = _voc_lists(root) if root else _voc_folders(path)
    if not files:
        raise DataError(
            f"{path} has no layout of Pascal VOC: Annotations/*.xml and JPEGImages, or train/*.xml."
        )
    whole = read_voc([file for part in files.values() for file in part], path)
    images = root / "JPEGImages" if root else None
    return {part: read_voc(xml, images or xml[0].parent, whole.classes) for part, xml in files.items()}


def _voc_lists(root: Path) -> dict[str, list[Path]]:
    """By the lists in ImageSets/Main; without, all files."""
    found = {}
    for part in PARTS:
        listed = root / "ImageSets" / "Main" / f"{part}.txt"
        if listed.is_file():
            names = [line.split()[0] for line in read_text(listed).splitlines() if line.strip()]
            found[part] = [root / "Annotations" / f"{name}.xml" for name in names]
    every = sorted((root / "Annotations").glob("*.xml"))
    return {part: files for part, files in found.items() if files} or ({"all": every} if every else {})


def _voc_folders(path: Path) -> dict[str, list[Path]]:
    """Xml files beside their images, in a folder for each part or in one."""
    every = sorted(path.glob("*.xml"))
    return _part_folders(path, "*.xml") or ({"all": every} if every else {})


def _part_folders(path: Path, pattern: str) -> dict[str, list[Path]]:
    """The files in `train`, `valid` and so on, of those that there are."""
    found = {
        part: sorted((path / name).glob(pattern))
        for part, names in FOLDERS.items()
        for name in names
        if (path / name).is_dir()
    }
    return {part: files for part, files in found.items() if files}


# ---- LabelMe -----------------------------------------------------------------------------------------------


def _labelme_files(path: Path) -> dict[str, list[Path]]:
    """Json files in a folder for each part, or in one, with their subfolders."""
    if path.is_file():
        return {"all": [path]}
    every = sorted(file for file in path.rglob("*.json") if not file.name.startswith("."))
    if not every:
        raise DataError(f"{path} has no json files, as LabelMe writes them beside the images.")
    return _part_folders(path, "**/[!.]*.json") or {"all": every}


def check_agree(parts: Mapping[str, Collection]) -> None:
    """Raises `DataError` where parts have other classes or keypoints than the first."""
    (first, main), *others = parts.items()
    for part, other in others:
        known = dict(zip(main.category_ids, main.classes, strict=True))
        for number, name in zip(other.category_ids, other.classes, strict=True):
            if known.get(number) != name:
                raise DataError(
                    f"The {part} part has the category {number} {name!r}; in the {first} part that number is "
                    f"{known.get(number)!r}. Parts share one list of categories."
                )
        if (main.skeleton and main.skeleton.names) != (other.skeleton and other.skeleton.names):
            raise DataError(f"The {part} part has other keypoints than the {first} part.")
