"""Losses, mixing and metrics of image classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from pictures import COLOURS, folders
from torch import nn

import zoo
from domains.vision.data import VisionData
from domains.vision.losses import build_loss
from domains.vision.task import VisionTask, confused, per_class
from zoo.errors import CheckpointError, ConfigError
from zoo.training.optim import parameter_groups

SMALL = {"embed_dims": [8, 8], "depths": [1, 1], "head_dim": 4, "n_win": 2}


def task(root: Path, loss: dict[str, Any] | None = None, **options: Any) -> tuple[VisionTask, VisionData]:
    data = VisionData("imagefolder", root, **({"size": 16} | options))
    data.setup()
    cfg = OmegaConf.create({"model": {"name": "biformer_digits", **SMALL}, "loss": loss or {}})
    return VisionTask.build(cfg, data), data


def test_smoothed_cross_entropy_equals_that_of_torch() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 1])
    loss = build_loss(label_smoothing=0.1)
    total, count = loss.sums(logits, loss.targets(labels, 4))
    torch.testing.assert_close(total / count, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_balanced_weights_equal_those_of_torch() -> None:
    logits, labels, counts = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([30, 10, 20])
    loss = build_loss(class_weights="balanced", counts=counts)
    total, count = loss.sums(logits, loss.targets(labels, 3))
    weight = counts.sum() / (3 * counts.float())
    torch.testing.assert_close(total / count, F.cross_entropy(logits, labels, weight=weight))


def test_binary_cross_entropy_is_the_mean_over_classes() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 1])
    loss = build_loss(name="bce")
    total, count = loss.sums(logits, loss.targets(labels, 4))
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 4).float())
    torch.testing.assert_close(total / count, expected)


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_an_unreadable_image_counts_for_nothing(name: str) -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([2, -1, 1])
    loss = build_loss(name=name, label_smoothing=0.1)
    all_three = loss.sums(logits, loss.targets(labels, 4))
    known = loss.sums(logits[[0, 2]], loss.targets(labels[[0, 2]], 4))
    torch.testing.assert_close(torch.stack(all_three), torch.stack(known))


@pytest.mark.parametrize(
    "options", [{"name": "crossentropy"}, {"label_smoothing": 1.0}, {"class_weights": "even"}]
)
def test_loss_mistakes_are_named(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build_loss(**options)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_batches_of_any_size_are_mixed(count: int, mode: str, tmp_path: Path) -> None:
    folders(tmp_path, dict.fromkeys(COLOURS, 3))
    mixing = {"mixup": 0.5, "cutmix": 1.0, "mixup_mode": mode}
    made, _ = task(tmp_path, {"label_smoothing": 0.1}, augment=mixing)
    made.batch_idx, made.trainer = 0, _Epoch()  # pyright: ignore[reportAttributeAccessIssue]
    images, labels = torch.randn(count, 3, 16, 16), torch.arange(count) % 3
    kept = images.clone()
    mixed, targets = made._mixed(images, labels)
    again, _ = made._mixed(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    assert torch.equal(images, kept)
    assert torch.equal(mixed, again)
    assert torch.equal(mixed, images) == (count == 1)
    if count == 5:
        assert torch.equal(mixed[4], images[4])


class _Epoch:
    current_epoch = global_rank = 0


def test_per_class_numbers_follow_from_the_confusion_matrix() -> None:
    confusion = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    rows = per_class(confusion, ["a", "b", "c"])
    assert rows["a"] == {"precision": 0.888889, "recall": 0.8, "f1": 0.842105, "images": 10}
    assert rows["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 0}
    assert confused(confusion, ["a", "b", "c"]) == [["a", "b", 2], ["b", "a", 1]]


def test_layer_decay_follows_the_layers_of_timm() -> None:
    model = zoo.create_model("biformer_digits", **SMALL)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert rates["head.weight"] == 1.0
    last = {rate for name, rate in rates.items() if name.startswith("stages.1.1.")}
    assert last == {rates["norm.weight"]} == {0.5}
    assert rates["stem.1.conv.weight"] == min(rates.values())


def test_weights_without_class_names_are_only_used_on_as_many_classes(tmp_path: Path) -> None:
    folders(tmp_path, dict.fromkeys(COLOURS, 2))
    data = VisionData("imagefolder", tmp_path)
    data.setup("test")
    model = zoo.create_model("biformer_digits", **SMALL, num_classes=10)
    with pytest.raises(CheckpointError, match="10 classes apart, without their names; the data have 3"):
        VisionTask.check(VisionTask.facts_of(model), data, "weights")


def test_balanced_weights_come_from_the_training_part(tmp_path: Path) -> None:
    folders(tmp_path, {"red": 20, "blue": 10})
    made, _ = task(tmp_path, {"class_weights": "balanced"})
    torch.testing.assert_close(made.error.weight, torch.tensor([21 / 14, 21 / 28]))


def test_a_model_of_one_channel_is_made_for_grey_images(tmp_path: Path) -> None:
    folders(tmp_path, dict.fromkeys(COLOURS, 3))
    made, data = task(tmp_path, channels=1)
    batch = data.collate([data.train_set[0], data.train_set[1]])
    assert isinstance(made.model, nn.Module)
    assert made.model(batch["image"]).shape == (2, 3)
