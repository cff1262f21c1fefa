"""Classification losses on soft targets, as sums that batches and processes can share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, did_you_mean

LOSSES = ("cross_entropy", "bce")


class SoftTargetLoss:
    """Cross entropy, or the binary one of every class (timm's `bce_loss`), against shares of classes.

    Args:
        name: `cross_entropy` or `bce`.
        smoothing: share of each label that is spread evenly over the K classes.
        weight: `(K,)` weight of each class; a batch then counts by its weights.
    """

    def __init__(self, name: str, smoothing: float, weight: Tensor | None) -> None:
        self.name, self.smoothing, self.weight = name, smoothing, weight

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """`(B, K)` smoothed shares of labels `(B,)`; a negative label gives zeros."""
        known = (labels >= 0)[:, None]
        ones = F.one_hot(labels.clamp(min=0), num_classes) * known
        return ones * (1 - self.smoothing) + known * (self.smoothing / num_classes)

    def sums(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the loss of `(B, K)` logits against `(B, K)` targets, and what to divide it by."""
        logits = logits.float()
        weighted = targets if self.weight is None else targets * self.weight.to(targets)
        if self.name == "bce":
            known = targets.sum(1, keepdim=True) > 0
            weights = known.expand_as(logits).to(logits)
            if self.weight is not None:
                weights = weights * self.weight.to(logits)
            return F.binary_cross_entropy_with_logits(
                logits, targets, weights, reduction="sum"
            ), weights.sum()
        return -(weighted * logits.log_softmax(1)).sum(), weighted.sum()


def build_loss(
    *,
    name: str | None = None,
    label_smoothing: float = 0.0,
    class_weights: str | None = None,
    counts: Tensor | None = None,
) -> SoftTargetLoss:
    """The loss of the config section `loss`.

    Args:
        name: `cross_entropy` (the default) or `bce`.
        label_smoothing: from 0 up to, not including, 1.
        class_weights: `balanced`: each class weighs inversely to its training images.
        counts: `(K,)` training images of each class.

    Raises:
        ConfigError: another name, or a number out of its range.
    """
    name = name or "cross_entropy"
    if name not in LOSSES:
        raise ConfigError(
            f"There is no loss.name={name}.{did_you_mean(name, LOSSES)} Losses: {', '.join(LOSSES)}."
        )
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"loss.label_smoothing={label_smoothing}: at least 0, below 1.")
    if class_weights not in (None, "balanced"):
        raise ConfigError(f"loss.class_weights={class_weights} is not one of balanced, null.")
    weight = None
    if class_weights and counts is not None:
        weight = counts.sum() / (torch.count_nonzero(counts) * counts.clamp(min=1).float())
    return SoftTargetLoss(name, label_smoothing, weight)
