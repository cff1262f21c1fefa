"""From image files and trained weights to a table of labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from domains.vision.images import Picture, is_image, read_image
from domains.vision.plots import contact_sheet
from domains.vision.preprocess import Preprocessing
from zoo.cli.console import console
from zoo.devices import chosen_device
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.files import atomic_path, find_files
from zoo.plots import GREEN, GREY, VERMILION

SHEET = 48
"""Pictures on a contact sheet."""
SURE, UNSURE = 0.8, 0.5


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Classify the images of `cfg.input`; write their labels, and a contact sheet if asked for.

    Args:
        model: in eval mode, as `zoo.load_model` returns it.
        facts: the `extra` stored with it, as `VisionData.extra` makes it.
        cfg: as `configs/predict.yaml` with `configs/predict/vision.yaml`.

    Returns:
        The files written: the table `path, label, probability, label_2, probability_2, ...`, then the sheet.

    Raises:
        DataError: there are no images, or none that can be read.
        ConfigError: a setting that cannot be.
    """
    output = _checked_output(cfg)
    files = find_images(cfg.input)
    preprocessing = Preprocessing(**facts["preprocessing"])
    names = class_names(model, facts, cfg.classes)
    rows, probabilities, unreadable = _classified(model, preprocessing, files, cfg)
    if unreadable:
        shown = "; ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
        console.print(
            f"Left out {len(unreadable)} of {len(files)} files: {shown}", highlight=False, soft_wrap=True
        )
    if not rows:
        raise DataError(f"None of the {len(files)} files of input={cfg.input} can be read as an image.")
    table = label_table([files[i] for i in rows], probabilities, names, cfg.topk)
    _write(table, output)
    shares = table["label"].value_counts()
    console.print(
        f"{len(table)} images: " + ", ".join(f"{name} {count}" for name, count in shares.head(10).items()),
        highlight=False,
        soft_wrap=True,
    )
    if not cfg.plots:
        return [output]
    sheet = Path(cfg.plots) / "labels.png"
    draw_sheet(table, preprocessing, sheet)
    return [output, sheet]


def find_images(source: str | None) -> list[Path]:
    """The images of a file, a folder with its subfolders, or a glob.

    Raises:
        ConfigError: nothing was asked for.
        DataError: nothing is there.
    """
    if not source:
        raise ConfigError("zoo predict needs images: input=FILE, input=FOLDER or input='FOLDER/*.jpg'.")
    return find_files(source, is_image)


def class_names(model: nn.Module, facts: Mapping[str, Any], file: str | None) -> list[str]:
    """Names of the outputs: of a file with a line for each, of the weights, or else numbers.

    Raises:
        DataError: the file has another number of lines than the model outputs.
    """
    count = cast(Any, model).num_classes
    if count < 1:
        raise ConfigError("The model has no classifier (num_classes=0): it gives features, not labels.")
    if not file:
        return list(facts["classes"] or map(str, range(count)))
    try:
        names = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"classes={file} cannot be read: {error.strerror}.") from None
    if len(names) != count:
        raise DataError(f"classes={file} has {len(names)} lines; the model tells {count} classes apart.")
    return names


def label_table(
    files: Sequence[Path], probabilities: np.ndarray, names: Sequence[str], topk: int
) -> pd.DataFrame:
    """The `topk` likeliest classes of each file, from probabilities `[n, K]`, best first."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :topk]
    columns: dict[str, Any] = {"path": [str(file) for file in files]}
    for k in range(best.shape[1]):
        suffix = f"_{k + 1}" if k else ""
        columns[f"label{suffix}"] = [names[i] for i in best[:, k]]
        columns[f"probability{suffix}"] = probabilities[np.arange(len(files)), best[:, k]].round(6)
    return pd.DataFrame(columns)


def draw_sheet(table: pd.DataFrame, preprocessing: Preprocessing, path: Path) -> None:
    """Pictures with label and probability; of many, the least certain."""
    shown, title = table, f"{len(table)} images"
    if len(table) > SHEET:
        shown = table.sort_values("probability", kind="stable").head(SHEET)
        title = f"The {SHEET} least certain of {len(table)} images"
    title += f" (green: {100 * SURE:.0f} % and more, red: below {100 * UNSURE:.0f} %)"
    paths = [Path(path) for path in shown["path"]]
    depth = 1 if len({path.name for path in paths}) == len(paths) else 2
    tiles = []
    for row in shown.to_dict("records"):
        colour = GREEN if row["probability"] >= SURE else GREY if row["probability"] >= UNSURE else VERMILION
        picture = read_image(row["path"], channels=preprocessing.channels, max_value=preprocessing.max_value)
        caption = (
            f"{row['label']} {100 * row['probability']:.0f} %\n{'/'.join(Path(row['path']).parts[-depth:])}"
        )
        tiles.append((picture, caption, colour))
    contact_sheet(tiles, path, title)


class _Files(Dataset):
    """Files as tensors; of one that cannot be read, the reason."""

    def __init__(self, files: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.files, self.preprocessing = files, preprocessing
        self.transform = preprocessing.evaluation()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            picture: Picture = read_image(
                self.files[i], channels=self.preprocessing.channels, max_value=self.preprocessing.max_value
            )
        except DataError as error:
            return i, str(error)
        return i, self.transform(picture)


@torch.inference_mode()
def _classified(
    model: nn.Module, preprocessing: Preprocessing, files: Sequence[Path], cfg: DictConfig
) -> tuple[list[int], np.ndarray, list[str]]:
    """Places of the files that could be read, their probabilities `[n, K]`, and why others could not."""
    device = chosen_device(cfg.device)
    model.to(device)
    rows: list[int] = []
    parts: list[np.ndarray] = []
    unreadable: list[str] = []
    for batch in _batches(_Files(files, preprocessing), cfg):
        good = [(i, image) for i, image in batch if isinstance(image, Tensor)]
        unreadable += [str(reason) for _, reason in batch if not isinstance(reason, Tensor)]
        if good:
            images = torch.stack([image for _, image in good]).to(device)
            parts.append(model(images).float().softmax(1).cpu().numpy())
            rows += [i for i, _ in good]
    return rows, np.concatenate(parts) if parts else np.zeros((0, 0)), unreadable


def _batches(files: _Files, cfg: DictConfig) -> Iterator[list[tuple[int, Tensor | str]]]:
    if cfg.batch_size < 1 or cfg.topk < 1:
        raise ConfigError(f"batch_size={cfg.batch_size} and topk={cfg.topk} must be at least 1.")
    loader = DataLoader(files, cfg.batch_size, num_workers=cfg.num_workers, collate_fn=list)
    yield from track(loader, "Classifying", console=console, transient=True)


def _checked_output(cfg: DictConfig) -> Path:
    path = Path(cfg.output)
    if path.suffix not in (".csv", ".parquet"):
        hint = did_you_mean(path.suffix, (".csv", ".parquet"))
        raise ConfigError(f"output={cfg.output}: the suffix must be .csv or .parquet.{hint}")
    return path


def _write(table: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as part:
        if path.suffix == ".csv":
            table.to_csv(part, index=False)
        else:
            table.to_parquet(part, index=False)
