"""Training and judging of detectors: boxes, or poses, as the model predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import RenderableType
from torch import Tensor, nn

from domains.detection import report
from domains.detection.annotations import skeleton_from
from domains.detection.baselines import mean_results, untrained_like
from domains.detection.data import DetectionData
from domains.detection.judge import judged
from domains.detection.keypoints import VISIBILITY, PoseLoss, Skeleton
from domains.detection.losses import Focal, IoUAware, box_terms
from domains.detection.matching import SetLoss
from domains.detection.metrics import Scores
from domains.detection.models.detector import layers
from domains.detection.transfer import official_facts, transfer
from zoo.cli.console import console
from zoo.errors import ConfigError
from zoo.training.callbacks import gather
from zoo.training.task import Task, checked, new_model


class DetectionTask(Task):
    """Trains by matching predictions and objects one to one; judges by the metrics of COCO.

    Args:
        model: a detector, or a pose model: one with `num_keypoints`.
        cfg: the run's config; `loss` is read beside what `Task` reads.
        facts: the `extra()` of the data the model was made for.
    """

    monitor: ClassVar[str] = "val/ap"
    mode: ClassVar[str] = "max"

    def __init__(self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any]) -> None:
        super().__init__(model, cfg)
        self.pose = is_pose(model)
        kind = skeleton_from(facts.get("skeleton"))
        options = OmegaConf.select(cfg, "loss", default=OmegaConf.create())
        self.error = build_loss(kind if self.pose else None, **checked("loss", build_loss, options))
        self.seen: list[dict[str, Any]] = []
        self.scores: Scores | None = None

    @classmethod
    def build(cls, cfg: DictConfig, data: DetectionData, model: nn.Module | None = None) -> Self:
        """The task for `data`, with `model`, or else a new one as `cfg.model` says."""
        model = model or new_model(cfg, data)
        data.use(is_pose(model))
        return cls(model, cfg, data.extra())

    @staticmethod
    def facts_of(model: nn.Module) -> dict[str, Any]:
        """Facts of weights that carry none, as official ones: classes are numbers of COCO's categories."""
        return official_facts(model)

    @staticmethod
    def check(facts: Mapping[str, Any], data: DetectionData, source: str) -> None:
        """See that the weights know the classes and keypoints of the data.

        Raises:
            CheckpointError: they do not.
        """
        data.check(facts, source)

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: DetectionData) -> None:
        """Number the classes of the data, and scale images, as the weights do."""
        data.follow(facts, "the checkpoint")

    @classmethod
    def transfer(cls, path: Path, data: DetectionData) -> nn.Module:
        """The model of a checkpoint, with new heads where classes or keypoints are others."""
        return transfer(path, data)

    def predict_step(self, batch: Sequence[Mapping[str, Any]], batch_idx: int) -> list[Any]:
        model = cast(Any, self.model)
        return [
            found
            for part in batch
            for found in model.postprocess(model(part["images"], part["mask"]), part["sizes"])
        ]

    def on_fit_start(self) -> None:
        hint = batch_hint(self.cfg, self.data.batch_size, self.trainer.accumulate_grad_batches)
        if hint and self.trainer.is_global_zero:
            console.print(hint, highlight=False, soft_wrap=True)

    # ---- loss and metrics --------------------------------------------------------------------------------

    def loss(self, batch: Sequence[Mapping[str, Any]], stage: str) -> tuple[Tensor, Tensor]:
        """Of a batch in parts, each weighed by its images."""
        totals, count = [], sum(len(part["images"]) for part in batch)
        for part in batch:
            shown = {"targets": part["targets"]} if stage == "train" and self._denoises else {}
            outputs = self.model(part["images"], part["mask"], **shown)
            totals.append(self._error(outputs, part["targets"]) * len(part["images"]))
            if stage != "train":
                self._keep(outputs, part, stage)
        total = torch.stack(totals).sum()
        return total, torch.tensor(float(count), device=total.device)

    def _error(self, outputs: Any, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        if isinstance(self.error, PoseLoss):
            return self.error(outputs, targets)[0]
        groups = cast(Any, self.model).active_groups
        total = self.error(layers(outputs), targets, groups)[0]
        if "denoised" in outputs:
            total = total + self.error.denoising(outputs["denoised"], targets)
        return total

    @property
    def _denoises(self) -> bool:
        return bool(getattr(self.model, "denoising", 0))

    def _keep(self, outputs: Any, part: Mapping[str, Any], stage: str) -> None:
        """The predictions of a part, in COCO's format."""
        found = cast(Any, self.model).postprocess(outputs, part["sizes"])
        collection = self._data.parts[stage]
        ids = [collection.images[i].id for i in part["index"]]
        for number, objects in zip(ids, found, strict=True):
            self.seen += coco_results(objects, number, self._category_ids)

    @property
    def _data(self) -> DetectionData:
        return cast(DetectionData, self.data)

    @property
    def _category_ids(self) -> list[int | None]:
        """For each class number of the model."""
        labels = self._data.numbered
        return [None if label is None else self._data.category_ids[label] for label in labels]

    def metrics(self, stage: str) -> dict[str, Tensor]:
        seen = [entry for part in gather(self.seen) for entry in part]
        self.seen = []
        self.scores = self.judge(seen, self._data, stage)
        if stage == "test":
            self.tested = seen
        stats = self.scores.stats
        return {
            name.lower(): torch.tensor(float("nan") if stats[name] is None else stats[name])
            for name in ("AP", "AP50")
        }

    def judge(self, results: Sequence[Mapping[str, Any]], data: DetectionData, stage: str) -> Scores:
        """The scores of results on a part of the data."""
        return judged(data.parts[stage], results, pose=self.pose)

    # ---- results -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def results(self, data: DetectionData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert self.scores is not None
        self.compared = {self.name: self.scores, **self._baselines(data)}
        return {
            "data": data.name,
            "model": self.name,
            "kind": "keypoints" if self.pose else "boxes",
            "images": {part: len(found) for part, found in data.parts.items()},
            "objects": {part: found.objects for part, found in data.parts.items()},
            "unreadable": len(data.unreadable),
            "tested_on_val": data.tested_on_val,
            "findings": dict(data.parts["test"].findings.counts),
            "scores": {name: scores.stats for name, scores in self.compared.items()},
            "classes": self.scores.classes,
        }

    def _baselines(self, data: DetectionData) -> dict[str, Scores]:
        """The mean boxes or poses of the training part, and the model before training."""
        if not (data.baselines and len(data.parts["train"])):
            return {}
        fresh = untrained_like(self.model).to(self.device)
        own, self.model = self.model, fresh
        try:
            self._predict_test(data)
        finally:
            self.model = own
        found = {"untrained": self.judge(self.seen, data, "test")}
        self.seen = []
        means = mean_results(data.parts["train"], data.parts["test"], pose=self.pose)
        what = "mean pose" if self.pose else "mean boxes"
        return {what: self.judge(means, data, "test"), **found}

    @torch.no_grad()
    def _predict_test(self, data: DetectionData) -> None:
        for batch in data.loader(data.test_set):
            for part in batch:
                outputs = self.model(part["images"].to(self.device), None)
                self._keep(outputs, part, "test")

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        return report.tables(results)

    def plots(self, data: DetectionData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.detection.plots import draw_results

        draw_results(self, data, results, folder)


def is_pose(model: nn.Module) -> bool:
    """Whether a model predicts keypoints rather than boxes."""
    return hasattr(model, "num_keypoints")


def build_loss(
    kind: Skeleton | None = None,
    *,
    name: str | None = None,
    ce: float = 2.0,
    l1: float | None = None,
    giou: float = 2.0,
    oks: float = 4.0,
    iou_aware: bool = False,
) -> SetLoss | PoseLoss:
    """The loss of a pose model for a skeleton, or of a detector.

    Args:
        name: `set`: there is no other.
        ce, l1, giou, oks: weights, in the loss as in matching; of l1 by default 5 for boxes and 10 for poses.
        iou_aware: scores of a detector learn how well their boxes fit (LW-DETR).

    Raises:
        ConfigError: another name, or `iou_aware` of poses.
    """
    if name not in (None, "set"):
        raise ConfigError(f"There is no loss.name={name} for detection: leave it out, and set its weights.")
    focal = IoUAware(weight=ce, cost=ce) if iou_aware else Focal(weight=ce, cost=ce)
    if kind is not None:
        if iou_aware:
            raise ConfigError("loss.iou_aware is of boxes: leave it out for poses.")
        return PoseLoss(kind, l1=10.0 if l1 is None else l1, similarity=oks, focal=focal)
    return SetLoss(box_terms(5.0 if l1 is None else l1, giou), focal)


def batch_hint(cfg: DictConfig, batch_size: int, accumulated: int) -> str | None:
    """What to say of steps of more or fewer images than the published recipe of `cfg.published` has.

    Args:
        batch_size: images over all processes, of which `accumulated` batches are a step.
    """
    published = OmegaConf.select(cfg, "published")
    total = batch_size * accumulated
    if not published or total == published.batch_size:
        return None
    text = f"{total} images a step, where the published recipe has {published.batch_size}: AP may differ."
    if cfg.optimizer.lr != published.lr:
        return text
    lr = published.lr * total / published.batch_size
    text += f" In proportion the learning rate is optimizer.lr={lr:.3g}"
    batches, rest = divmod(published.batch_size, batch_size)
    as_many = f"; as many images are trainer.accumulate_grad_batches={batches}" if not rest else ""
    return f"{text}{as_many}."


def coco_results(
    found: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int | None]
) -> list[dict[str, Any]]:
    """What `postprocess` gives for an image, in COCO's format of results.

    Args:
        category_ids: of each class number; what is of a class without, or beyond, is no result.
    """
    labels, scores = found["labels"].tolist(), found["scores"].float().tolist()
    ids = [category_ids[label] if label < len(category_ids) else None for label in labels]
    if "keypoints" in found:
        points = found["keypoints"].float()
        values = torch.cat([points, torch.full_like(points[..., :1], VISIBILITY)], -1).flatten(1).tolist()
        field = "keypoints"
    else:
        corners = found["boxes"].float()
        values = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        field = "bbox"
    return [
        {"image_id": image_id, "category_id": number, "score": score, field: value}
        for number, score, value in zip(ids, scores, values, strict=True)
        if number is not None
    ]
