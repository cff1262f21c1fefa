"""Pascal VOC: an xml file for each image, lists of the parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from domains.detection.annotations import Collection, Findings, annotated
from domains.detection.pictures import is_picture
from zoo.errors import DataError


def read_voc(files: Sequence[Path], images: Path, classes: Sequence[str] | None = None) -> Collection:
    """Objects of xml files; `difficult` ones count as crowds: neither trained on nor judged.

    Args:
        images: the folder of images; an image that is not there is looked for beside its xml file.
        classes: their order; by default all that occur, sorted.

    Raises:
        DataError: a file that is not of this format, or an image that is missing.
    """
    findings = Findings()
    read = [(file, _root(file)) for file in files]
    names = list(classes or sorted({name for file, root in read for name in _classes(file, root)}))
    if not names:
        raise DataError(f"No object in {len(files)} xml files.")
    table = {path.name: path for path in images.iterdir() if is_picture(path)} if images.is_dir() else {}
    stems = {path.stem: path for path in table.values()}
    found = []
    for number, (file, root) in enumerate(read, 1):
        name = _text(root, "filename", file)
        image = table.get(name) or stems.get(file.stem) or file.parent / name
        size = tuple(_pixels(root, side, file) for side in ("height", "width"))
        objects = [
            _object(file, entry, names) | {"id": 1000 * number + n}
            for n, entry in enumerate(root.iter("object"), 1)
        ]
        found.append(annotated(image, number, (size[0], size[1]), objects, findings))
    return Collection(tuple(found), tuple(names), tuple(range(1, len(names) + 1)), findings=findings)


def _root(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{file} is no whole xml file: {error}.") from None


def _text(root: ElementTree.Element, name: str, file: Path) -> str:
    text = root.findtext(name)
    if not text or not text.strip():
        raise DataError(f"{file} has no <{name.replace('/', '><')}>: is it of Pascal VOC?")
    return text.strip()


def _pixels(root: ElementTree.Element, side: str, file: Path) -> int:
    text = _text(root, f"size/{side}", file)
    try:
        return int(float(text))
    except (OverflowError, ValueError):
        raise DataError(f"{file}: {side}={text} is no number of pixels.") from None


def _classes(file: Path, root: ElementTree.Element) -> list[str]:
    return [_text(entry, "name", file) for entry in root.iter("object")]


def _object(file: Path, entry: ElementTree.Element, names: Sequence[str]) -> dict[str, Any]:
    name = _text(entry, "name", file)
    if name not in names:
        raise DataError(f"{file}: the class {name!r} is not among {', '.join(names)}.")
    try:
        box = [float(_text(entry, f"bndbox/{side}", file)) for side in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError as error:
        raise DataError(f"{file}: a side of the box of {name!r} is no number ({error}).") from None
    # The first pixel is 1, and both ends belong to the box.
    box = [box[0] - 1, box[1] - 1, box[2], box[3]]
    return {
        "label": names.index(name),
        "box": box,
        "crowd": (entry.findtext("difficult") or "0").strip() == "1",
    }
