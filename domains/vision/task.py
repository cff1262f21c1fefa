"""Training and judging of image classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from domains.vision.data import UNREADABLE, VisionData, stored_options
from domains.vision.losses import build_loss
from domains.vision.preprocess import Preprocessing
from zoo.errors import CheckpointError
from zoo.training.callbacks import gather
from zoo.training.data import drawn_from
from zoo.training.task import Task, checked, new_model

SHOWN_CLASSES = 20
LISTED_PAIRS = 200


class VisionTask(Task):
    """Trains a classifier; images and labels may be mixed (MixUp, CutMix).

    Args:
        model: `(B, C, H, W) -> (B, K)` logits.
        cfg: the run's config; `loss` is read beside what `Task` reads.
        facts: the `extra()` of the data the model was made for: `classes`, `preprocessing`.
        data: what is trained on, of which mixing and class weights follow.
    """

    monitor: ClassVar[str] = "val/top1"
    mode: ClassVar[str] = "max"

    def __init__(
        self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any], data: VisionData | None = None
    ) -> None:
        super().__init__(model, cfg)
        self.num_classes = len(facts["classes"] or ()) or cast(Any, model).num_classes
        options = checked("loss", build_loss, OmegaConf.select(cfg, "loss", default=OmegaConf.create()))
        counts = None if data is None else torch.from_numpy(data.class_counts())
        self.error = build_loss(counts=counts, **options)
        self.mixer = data and data.augment.mixer(self.num_classes, self.error.smoothing)
        self.seed = data.seed if data else 0
        top5 = min(5, self.num_classes)
        ignored: dict[str, Any] = {"num_classes": self.num_classes, "ignore_index": UNREADABLE}
        self.top5 = MulticlassAccuracy(top_k=top5, average="micro", **ignored)
        self.confusion = MulticlassConfusionMatrix(**ignored)
        self.seen: list[Tensor] = []
        self.test_values: dict[str, float] = {}
        self.test_confusion = np.zeros((0, 0), dtype=np.int64)

    @classmethod
    def build(cls, cfg: DictConfig, data: VisionData, model: nn.Module | None = None) -> Self:
        """The task for `data`, prepared as `model` asks, which is made by `cfg.model` if none is given."""
        model = new_model(cfg, data) if model is None else model
        data.follow(model)
        return cls(model, cfg, data.extra(), data)

    @staticmethod
    def facts_of(model: nn.Module) -> dict[str, Any]:
        """Facts of weights that carry none, as official ones: classes are numbers."""
        return {
            "classes": None,
            "num_classes": cast(Any, model).num_classes,
            "preprocessing": asdict(Preprocessing.of(model)),
        }

    @staticmethod
    def check(facts: Mapping[str, Any], data: VisionData, source: str) -> None:
        """See that the weights know the classes of the data, by name, and take images of its channels.

        Raises:
            CheckpointError: names the classes that they do not know.
        """
        stored = Preprocessing(**facts["preprocessing"])
        if stored.channels != data.channels:
            raise CheckpointError(
                f"{source} takes images of {stored.channels} channels: set data.channels={stored.channels}."
            )
        if facts["classes"] is not None:
            data.number_as(facts["classes"], source)
        elif facts["num_classes"] != len(data.class_names):
            raise CheckpointError(
                f"{source} tells {facts['num_classes']} classes apart, without their names; the data have "
                f"{len(data.class_names)}. Give data of the same classes, or adapt it with zoo finetune."
            )

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: VisionData) -> None:
        """Prepare the images as those that the weights were trained on, save what was given for the data."""
        given = {name: value for name, value in data.given.items() if value is not None}
        data.use(Preprocessing(**(facts["preprocessing"] | given)))

    @staticmethod
    def data_options(facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in stored_options(facts).items() if given.get(name) is None}

    @classmethod
    def transfer(cls, path: Path, data: VisionData) -> nn.Module:
        """The model of a checkpoint for the classes of `data`; what the head knows of them is kept."""
        from domains.vision.probe import transfer

        return transfer(path, data)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["image"]).softmax(1)

    def loss(self, batch: Mapping[str, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        images, labels = batch["image"], batch["label"]
        if stage == "train":
            images, targets = self._mixed(images, labels)
            return self.error.sums(self.model(images), targets)
        logits = self.model(images).float()
        self.top5.update(logits, labels)
        self.confusion.update(logits, labels)
        if stage == "test":
            self._keep(logits, batch)
        known = labels >= 0
        return nn.functional.cross_entropy(
            logits, labels, reduction="sum", ignore_index=UNREADABLE
        ), known.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch_idx = batch_idx
        return super().training_step(batch, batch_idx)

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and `(B, K)` targets, mixed by (seed, epoch, batch, process); of an odd batch the last is
        not."""
        targets = self.error.targets(labels, self.num_classes)
        even = len(labels) // 2 * 2
        if self.mixer is None or even == 0:
            return images, targets
        with drawn_from(self.seed, self.current_epoch, self.batch_idx, self.global_rank):
            mixed, shares = self.mixer(images[:even].clone(), labels[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([shares.to(targets), targets[even:]])

    def _keep(self, logits: Tensor, batch: Mapping[str, Tensor]) -> None:
        """What is needed of each test image: `(B, 4)` place, label, prediction, its probability."""
        probability, prediction = logits.softmax(1).max(1)
        columns = (batch["index"], batch["label"], prediction, probability)
        self.seen.append(torch.stack([column.double().cpu() for column in columns], 1))

    def metrics(self, stage: str) -> dict[str, Tensor]:
        confusion = self.confusion.compute()
        values = {
            "top1": confusion.diagonal().sum() / confusion.sum().clamp(min=1),
            "top5": self.top5.compute(),
        }
        self.confusion.reset()
        self.top5.reset()
        if stage == "test":
            self.test_confusion = confusion.cpu().numpy()
            self.test_values = {name: float(value) for name, value in values.items()}
            self.seen = [torch.cat([part for parts in gather(self.seen) for part in parts])]
        return values

    # ---- results -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def results(self, data: VisionData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.vision.baselines import baseline_accuracy

        tested = int(self.test_confusion.sum())
        baselines = baseline_accuracy(data) if data.baselines and len(data.parts["train"]) else {}
        classes = data.class_names if len(data.class_names) == self.num_classes else None
        names = classes or [str(i) for i in range(self.num_classes)]
        return {
            "data": data.dataset or data.name,
            "images": {part: len(images) for part, images in data.parts.items()},
            "unreadable": len(data.unreadable) + data.size("test") - tested,
            "tested_on_val": data.parts["val"] is data.parts["test"],
            "accuracy": {
                name: round(value, 6)
                for name, value in {self.name: self.test_values["top1"], **baselines}.items()
            },
            "top5": round(self.test_values["top5"], 6),
            "classes": per_class(self.test_confusion, names),
            "confused": confused(self.test_confusion, names),
            "confusion": self.test_confusion.tolist() if self.num_classes <= 100 else None,
        }

    def headline(self, results: dict[str, Any]) -> dict[str, float]:
        """Share of images whose class is first, and among the first five."""
        return {"top-1": results["accuracy"][self.name], "top-5": results["top5"]}

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        return [_comparison(results, self.name), _class_table(results), *_verdict(results, self.name)]

    def plots(self, data: VisionData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.vision.plots import draw_results

        draw_results(self, data, results, folder)


def per_class(confusion: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float | int]]:
    """Precision, recall, F1 and number of test images of each class, from counts `[true, predicted]`."""
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(true, 1)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    return {
        name: {
            "precision": round(float(precision[i]), 6),
            "recall": round(float(recall[i]), 6),
            "f1": round(float(f1[i]), 6),
            "images": int(true[i]),
        }
        for i, name in enumerate(names)
    }


def confused(confusion: np.ndarray, names: Sequence[str]) -> list[list[Any]]:
    """The most frequent mistakes: true class, predicted class, images."""
    mistakes = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-mistakes, axis=None, kind="stable")[:LISTED_PAIRS]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [[names[i], names[j], int(mistakes[i, j])] for i, j in pairs if mistakes[i, j] > 0]


def _comparison(results: Mapping[str, Any], own: str) -> Table:
    accuracy, tested = results["accuracy"], results["images"]["test"]
    table = Table("classifier", "top-1", "errors", f"errors of {own}", title=f"Test of {tested} images")
    for name, value in accuracy.items():
        margin = "" if name == own else _fewer(accuracy[own], value)
        table.add_row(
            name,
            f"{100 * value:.2f} %",
            f"{100 * (1 - value):.2f} %",
            margin,
            style="bold" if name == own else None,
        )
    return table


def _class_table(results: Mapping[str, Any]) -> Table:
    """All classes, or where there are many the worst."""
    rows = [(name, values) for name, values in results["classes"].items() if values["images"]]
    title = "Classes"
    if len(rows) > SHOWN_CLASSES:
        title = f"The {SHOWN_CLASSES} worst of {len(rows)} classes"
        rows = sorted(rows, key=lambda row: row[1]["f1"])[:SHOWN_CLASSES]
    mistakes: dict[str, list[str]] = {}
    for true, predicted, count in results["confused"]:
        mistakes.setdefault(true, []).append(f"{predicted} ({count})")
    table = Table("class", "images", "precision", "recall", "F1", "taken for", title=title)
    for name, values in rows:
        numbers = (f"{100 * values[key]:.1f} %" for key in ("precision", "recall", "f1"))
        table.add_row(name, str(values["images"]), *numbers, ", ".join(mistakes.get(name, [])[:3]))
    return table


def _fewer(own: float, other: float) -> str:
    """How many errors fewer the model makes."""
    if other >= 1:
        return "as few" if own >= 1 else "more"
    gain = 100 * (1 - (1 - own) / (1 - other))
    return f"{abs(gain):.0f} % {'fewer' if gain >= 0 else 'more'}"


def _verdict(results: Mapping[str, Any], own: str) -> list[str]:
    accuracy = results["accuracy"]
    lines = [f"Top-1 {100 * accuracy[own]:.2f} %, top-5 {100 * results['top5']:.2f} %."]
    others = {name: value for name, value in accuracy.items() if name != own}
    if others:
        best = max(others, key=lambda name: others[name])
        lines.append(
            f"Error {100 * (1 - accuracy[own]):.2f} %: {_fewer(accuracy[own], others[best])} errors than the "
            f"best baseline ({best}, {100 * (1 - others[best]):.2f} %)."
        )
    if results["tested_on_val"]:
        lines.append("The data have no test part: the best epoch was chosen on the images it is tested on.")
    if results["unreadable"]:
        lines.append(f"{results['unreadable']} images could not be read and are left out.")
    return lines
