"""The worked configs, trained by mmdet's own runner on four images and judged by its CocoMetric."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from domains.detection.task import DetectionTask
from zoo.paths import config_dir

pytestmark = pytest.mark.usefixtures("mmdet")
CONFIGS = config_dir() / "mmdet"
NUMBERS = count()
"""mmengine keeps what it logs by the name of the run, for the whole process."""


def _config(name: str, folder: Path, steps: int, **changes: Any) -> Any:
    from mmengine.config import Config  # pyright: ignore[reportMissingImports]

    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    cfg.merge_from_dict(
        {
            "work_dir": str(folder / "run"),
            "train_cfg.max_iters": steps,
            "train_cfg.val_interval": steps,
            "default_hooks.checkpoint.interval": steps,
            "default_hooks.logger.interval": 1,
            "log_level": "ERROR",
            **changes,
        }
    )
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for step in cfg[loader].dataset.pipeline:
            if step.type == "Resize":
                step.scale = (96, 96)
    return cfg


def _trained(cfg: Any) -> tuple[Any, list[float], dict[str, float]]:
    """The runner, the loss of each step, and the metrics."""
    from mmengine.runner import Runner  # pyright: ignore[reportMissingImports]

    cfg.experiment_name = f"run_{next(NUMBERS)}"
    runner = Runner.from_cfg(cfg)
    runner.train()
    hub = runner.message_hub
    losses = hub.get_scalar("train/loss").data[0].tolist()
    metrics = {
        name.removeprefix("val/"): hub.get_scalar(name).current()
        for name in hub.log_scalars
        if name.startswith("val/coco")
    }
    return runner, losses, metrics


def test_retinanet_on_a_backbone_of_the_zoo_learns(people: Path, tmp_path: Path) -> None:
    _, losses, metrics = _trained(_config("retinanet_biformer_tiny_few", tmp_path, 14))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert set(metrics) >= {"coco/bbox_mAP", "coco/bbox_mAP_50"}
    assert -1 <= metrics["coco/bbox_mAP_50"] <= 1


def test_group_detr_learns_and_its_checkpoint_is_one_of_the_zoo(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, losses, metrics = _trained(_config("group_detr_mini_few", tmp_path, 20))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert metrics["coco/bbox_mAP"] >= 0
    model, extra = zoo.load_model(tmp_path / "run" / "iter_20.pth")
    assert extra["classes"] == ["person"]
    assert extra.keys() == DetectionTask.facts_of(model).keys()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = runner.model.eval()(x, mode="tensor")[0]
        torch.testing.assert_close(model(x)["logits"], wanted)


@pytest.mark.parametrize("people", ["drawn"], indirect=True)
def test_a_run_is_resumed_by_mmengine(tmp_path: Path, people: Path) -> None:
    _trained(_config("group_detr_mini_few", tmp_path, 2))
    cfg = _config("group_detr_mini_few", tmp_path, 4, resume=True)
    runner, losses, _ = _trained(cfg)
    assert runner.iter == 4
    assert (tmp_path / "run" / "iter_4.pth").is_file()
    assert len(losses) == 4, "the history of the first run is read as well"


@pytest.mark.parametrize("name", ["retinanet_biformer_tiny_coco", "group_detr_r50_coco"])
def test_configs_for_all_of_coco_are_whole(name: str) -> None:
    """Their models are built and their pipelines are known; the weights they start from are not fetched."""
    from mmdet.registry import MODELS, TRANSFORMS  # pyright: ignore[reportMissingImports]
    from mmengine.config import Config  # pyright: ignore[reportMissingImports]

    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    model = MODELS.build(cfg.model)
    classes = cfg.model.num_classes if "num_classes" in cfg.model else cfg.model.bbox_head.num_classes
    assert classes == 80
    assert sum(p.numel() for p in model.parameters()) > 2e7
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        for step in loader.dataset.pipeline:
            TRANSFORMS.build(step)


def test_faster_rcnn_of_mmdet_trains_without_compiled_operators() -> None:
    """RPN, NMS and RoIAlign without `use_torchvision`, on a backbone of the zoo."""
    import mmdet  # pyright: ignore[reportMissingImports]
    from mmdet.registry import MODELS  # pyright: ignore[reportMissingImports]
    from mmdet.structures import DetDataSample  # pyright: ignore[reportMissingImports]
    from mmengine.config import Config  # pyright: ignore[reportMissingImports]
    from mmengine.structures import InstanceData  # pyright: ignore[reportMissingImports]

    base = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models" / "faster-rcnn_r50_fpn.py"
    cfg = Config.fromfile(base).model
    cfg.backbone = {"type": "ZooBackbone", "name": "resnet18"}
    cfg.neck.in_channels = [64, 128, 256, 512]
    model = MODELS.build(cfg).train()
    size = {"img_shape": (96, 96), "ori_shape": (96, 96), "pad_shape": (96, 96), "scale_factor": (1.0, 1.0)}
    sample = DetDataSample(metainfo=size | {"batch_input_shape": (96, 96)})
    boxes = torch.tensor([[8.0, 8, 60, 70]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3]))
    parts = model(torch.randn(1, 3, 96, 96), [sample], mode="loss")
    total = model.parse_losses(parts)[0]
    total.backward()
    assert torch.isfinite(total)
    head = model.roi_head.bbox_head.shared_fcs[0].weight.grad
    assert float(head.abs().sum()) > 0
    with torch.no_grad():
        found = model.eval()(torch.randn(1, 3, 96, 96), [sample], mode="predict")
    assert found[0].pred_instances.bboxes.shape[1] == 4
