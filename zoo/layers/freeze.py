"""Training only part of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def freeze_blocks(
    blocks: Iterable[nn.Module], *, norms: Iterable[str], tuned: Iterable[str], num_tuned: int
) -> None:
    """Partially frozen attention (Liu et al. 2024, ST-LLM, section IV-D) of a stack of transformer blocks.

    Args:
        blocks: first to last.
        norms: parameters whose name in the block has one of these components train in every block.
        tuned: further components that train in the last `num_tuned` blocks.
    """
    blocks = list(blocks)
    for index, block in enumerate(blocks):
        trained = {*norms, *(tuned if index >= len(blocks) - num_tuned else ())}
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not trained.isdisjoint(name.split(".")))
