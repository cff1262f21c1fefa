"""What a layer remembers between decoding steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from zoo.attention.layers.base import AttentionLayer


class Cache:
    """Belongs to one layer and one batch; `length` tokens have been seen."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer = layer
        self.length = 0


class KVCache(Cache):
    """Keys and values of all tokens so far, in buffers that double when they are full."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__(layer)
        self._buffers: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Adds tokens, `(..., n, D)` each (keys and values, say), and returns all of each `(..., length, D)`.

        The cache is for inference: what it keeps carries no gradient.
        """
        start, stop = self.length, self.length + new[0].shape[-2]
        if not self._buffers or stop > self._buffers[0].shape[-2]:
            self._buffers = tuple(self._grown(i, tensor, stop) for i, tensor in enumerate(new))
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[..., start:stop, :] = tensor.detach()
        self.length = stop
        return tuple(buffer[..., :stop, :] for buffer in self._buffers)

    def _grown(self, i: int, new: Tensor, needed: int) -> Tensor:
        capacity = 1 << max(4, (needed - 1).bit_length())
        buffer = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
        if self._buffers:
            buffer[..., : self.length, :] = self._buffers[i][..., : self.length, :]
        return buffer

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What has been kept so far, `(..., length, D)` each."""
        return tuple(buffer[..., : self.length, :] for buffer in self._buffers)

    def nbytes(self) -> int:
        """Bytes in use, without the room for further tokens."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def default_positions(x: Tensor, cache: Cache | None) -> Tensor:
    """`(N,)`: the places of the tokens of `x` `(B, N, C)`, after those of the cache."""
    start = cache.length if cache is not None else 0
    return torch.arange(start, start + x.shape[1], device=x.device)
