"""`zoo explain` for images: what the attention of a classifier looks at, drawn over the image."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor, nn

from domains.vision.explain_plots import Panel, gates, overlays, routes
from domains.vision.images import read_image
from domains.vision.predict import class_names, find_images
from domains.vision.preprocess import Preprocessing
from domains.vision.recording import Layer, Point, Recording, check_layers, record
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.explain import head_statistics, rollout
from zoo.files import atomic_write

COLUMNS = (
    "image",
    "layer",
    "head",
    "queries",
    "keys",
    "entropy",
    "effective_keys",
    "largest_weight",
    "distance_px",
)
MOST_CELLS = 4096
"""Of a grid whose rollout is computed: a dense matrix of them."""
CORNERS: tuple[Point, ...] = ((0.2, 0.2), (0.25, 0.75), (0.8, 0.3))
"""Points whose routing is drawn beside that of the query."""


def explain(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Draw, for each image of `cfg.input`, what attention looks at, into `cfg.output`.

    `attention.png`: what one query sees in each layer. `class.png`: where attention speaks for the class.
    `rollout.png`: the layers of a stage together. `routing.png`: which regions see which, in layers that
    route. `gates.png`: the gates of LWGANet. Beside them `statistics.csv` and `explanation.json`.

    Returns:
        The files written.

    Raises:
        ConfigError: an unknown layer, class or query.
        DataError: no image can be read.
    """
    layers = [cfg.layer] if isinstance(cfg.layer, str) else list(cfg.layer or ())
    check_layers(model, layers)
    named = cfg.classes or facts.get("classes")
    classes = class_names(model, facts, cfg.classes) if named else None
    target, point = _target(cfg.target, classes), _point(cfg.query)
    stored = facts.get("preprocessing")
    preprocessing = Preprocessing(**stored) if stored else Preprocessing.of(model)
    folder = Path(cfg.output)
    rows: list[list[Any]] = []
    done: dict[str, Any] = {}
    files: list[Path] = []
    skipped = 0
    images = _images(cfg.input)
    for path, name in track(images, "Explaining", console=console, disable=len(images) == 1, transient=True):
        try:
            picture = read_image(path, channels=preprocessing.channels, max_value=preprocessing.max_value)
        except DataError as error:
            if len(images) == 1:
                raise
            skipped += 1
            console.print(f"Skipped: {error}", markup=False, highlight=False, soft_wrap=True)
            continue
        x = preprocessing.evaluation()(picture)[None].to(next(model.parameters()).device)
        recording = record(model, x, target=target, layers=layers)
        rows += _statistics(name, recording, x.shape[2:])
        shown, drawn = _draw(recording, _as_image(x[0], preprocessing), point, folder / name, classes, cfg)
        done[name] = shown | {"file": str(path)}
        files += drawn
    if skipped:
        console.print(f"{skipped} of {len(images)} images could not be read.", highlight=False)
    if not done:
        raise DataError(f"None of the {len(images)} images of {cfg.input} can be read.")
    return [*files, *_write(folder, rows, {"query": list(point), "images": done})]


# ---- what is asked for -------------------------------------------------------------------------------------


def _images(source: str | None) -> list[tuple[Path, str]]:
    """Image files, and the folder below the output that each is explained in."""
    if not source:
        raise ConfigError("zoo explain needs images: input=FILE, input=FOLDER or input='FOLDER/*.jpg'.")
    files = find_images(source)
    names = [file.relative_to(source) if Path(source).is_dir() else Path(file.name) for file in files]
    stems = [str(name.with_suffix("")) for name in names]
    return [
        (file, stem if stems.count(stem) == 1 else f"{stem}_{file.suffix[1:]}")
        for file, stem in zip(files, stems, strict=True)
    ]


def _target(target: Any, classes: Sequence[str] | None) -> int | None:
    """The number of the class that is asked for, by name or number; None = the predicted one."""
    if target is None:
        return None
    if classes is not None and str(target) in classes:
        return list(classes).index(str(target))
    if isinstance(target, int):
        return target
    hint = did_you_mean(str(target), classes) if classes else " The model knows no names: give a number."
    raise ConfigError(f"target={target}: there is no such class.{hint}")


def _point(query: Any) -> Point:
    if query in ("centre", "center"):
        return 0.5, 0.5
    values = [] if isinstance(query, str) else list(query)
    if len(values) != 2 or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values):
        raise ConfigError(
            f"query={query}: write centre, or [DOWN, RIGHT] as shares of height and width, like [0.3,0.7]."
        )
    return float(values[0]), float(values[1])


# ---- pictures ----------------------------------------------------------------------------------------------


def _draw(
    recording: Recording,
    image: np.ndarray,
    point: Point,
    folder: Path,
    classes: Sequence[str] | None,
    cfg: DictConfig,
) -> tuple[dict[str, Any], list[Path]]:
    """The pictures of one image, and what is to know of them."""
    placed = [layer for layer in recording.layers if layer.places is not None]
    chosen = _spread(placed, cfg.panels)
    probability = float(recording.probabilities[recording.target])
    name = _class_name(recording.target, classes)
    title = f"{folder.name}: {name}{'' if cfg.target is None else ' as asked for'} ({probability:.0%})"
    files = []
    if chosen:
        panels = [
            Panel(_title(layer), *layer.seen(point), point=point if layer.asks else None) for layer in chosen
        ]
        overlays(
            image,
            panels,
            folder / "attention.png",
            title=f"{title}. What the query at + attends to, mean of the heads",
            label="weight / largest of the panel",
        )
        relevant = [Panel(_title(layer), *layer.relevance()) for layer in chosen]
        overlays(
            image,
            relevant,
            folder / "class.png",
            title=f"{title}. Attention that speaks for this class, weight x gradient",
            label="relevance / largest of the panel",
        )
        files += [folder / "attention.png", folder / "class.png"]
    files += _rollouts(placed, image, point, folder, title)
    files += _routes(placed, image, point, folder, title)
    if recording.gates:
        some = dict(_spread(list(recording.gates.items()), cfg.panels))
        gates(image, some, folder / "gates.png", title=f"{title}. Gates")
        files.append(folder / "gates.png")
    without = [layer.name for layer in recording.layers if layer.places is None]
    facts = {
        "class": name,
        "probability": round(probability, 6),
        "layers": [layer.name for layer in recording.layers],
        "drawn": [layer.name for layer in chosen],
        "without_places": without,
    }
    return facts, files


def _rollouts(
    layers: Sequence[Layer], image: np.ndarray, point: Point, folder: Path, title: str
) -> list[Path]:
    """What the query is made of after each stage, as far as attention among its own cells tells."""
    stages: dict[str, list[tuple[Layer, Tensor]]] = {}
    for layer in layers:
        assert layer.places is not None
        rows, columns = layer.places[0][0].grid
        if rows * columns <= MOST_CELLS and (mixing := layer.mixing()) is not None:
            key = f"{'.'.join(layer.name.split('.')[:2])}, {rows} x {columns} tokens"
            stages.setdefault(key, []).append((layer, mixing))
    panels = []
    for name, found in stages.items():
        places = found[-1][0].places
        assert places is not None
        queries = places[0][0]
        row, column = (
            min(int(share * real), side - 1)
            for share, real, side in zip(point, queries.real, queries.grid, strict=True)
        )
        made = rollout([mixing for _, mixing in found])[0, row * queries.grid[1] + column]
        count = f"{len(found)} layer{'s' if len(found) > 1 else ''}"
        panels.append(Panel(f"{name}, {count}", made.view(queries.grid), queries, point))
    if not panels:
        return []
    overlays(
        image,
        panels,
        folder / "rollout.png",
        title=f"{title}. Attention rollout: what the token at + is made of after a stage",
        label="share / largest of the panel",
    )
    return [folder / "rollout.png"]


def _routes(layers: Sequence[Layer], image: np.ndarray, point: Point, folder: Path, title: str) -> list[Path]:
    last: dict[str, Layer] = {
        ".".join(layer.name.split(".")[:2]): layer for layer in layers if layer.routed is not None
    }
    rows = [
        (layer.name, layer.routed, layer.places[0][0])
        for layer in last.values()
        if layer.routed and layer.places
    ]
    if not rows:
        return []
    path = folder / "routing.png"
    routes(image, rows, [point, *CORNERS], path, title=f"{title}. Routing: last routed layer of each stage")
    return [path]


def _title(layer: Layer) -> str:
    heads = layer.num_heads
    queries = "" if layer.asks else f", mean of {layer.maps[0].sizes[2]} queries"
    return f"{layer.name}\n{heads} head{'s' if heads > 1 else ''}{queries}"


def _class_name(number: int, classes: Sequence[str] | None) -> str:
    return str(classes[number]) if classes is not None else f"class {number}"


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, the last one among them."""
    if len(items) <= most:
        return list(items)
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[i] for i in places]


def _as_image(x: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """What the model saw, `(H, W, 3)` from 0 to 1: the first three bands, or grey."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    plain = (x.detach().cpu().float() * std + mean).clamp(0, 1)
    rgb = plain[:3] if len(plain) >= 3 else plain[:1].expand(3, -1, -1)
    return rgb.permute(1, 2, 0).numpy()


# ---- numbers -----------------------------------------------------------------------------------------------


def _statistics(image: str, recording: Recording, size: Sequence[int]) -> list[list[Any]]:
    rows = []
    for layer in recording.layers:
        head = 0
        for i, found in enumerate(layer.maps):
            places = layer.places[i] if layer.places is not None else None
            values = head_statistics(found, places, (float(size[0]), float(size[1])))
            for k in range(found.sizes[1]):
                numbers = (values.entropy, values.effective_keys, values.largest, values.distance)
                cells = ["" if number[k].isnan() else f"{float(number[k]):.6g}" for number in numbers]
                rows.append([image, layer.name, head, *found.sizes[2:], *cells])
                head += 1
    return rows


def _write(folder: Path, rows: list[list[Any]], facts: dict[str, Any]) -> list[Path]:
    table, summary = folder / "statistics.csv", folder / "explanation.json"
    with atomic_write(table, "w") as file:
        writer = csv.writer(file)
        writer.writerows([COLUMNS, *rows])
    with atomic_write(summary, "w") as file:
        json.dump(facts, file, indent=2)
    return [table, summary]
