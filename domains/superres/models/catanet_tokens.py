"""Token aggregation (TAB) of CATANet: attention in groups of tokens that are alike, and to token centres.

Shapes: B images, H x W map, N = H W tokens, C channels, M centres, groups of g tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from domains.superres.models.catanet_layers import ConvFFN, from_heads, head_width, to_heads
from zoo.attention import attend
from zoo.layers.linear import matrix

DECAY = 0.999
"""Of the moving average of the centres."""


class TokenAggregation(nn.Module):
    """Attention of each token to its group and the next, and to the centres; then a ConvFFN (TAB).

    Tokens go to the centre that is most like them (cosine) and stand in the order of their centres, those of
    one centre in raster order; that sequence is cut into groups of equal size. Keys past its end are its last
    tokens in reverse. The centres are a buffer: training refines them in each forward pass and lets the
    buffer follow, evaluation reads it. Until the first training step it is empty, and the means of M runs of
    the tokens stand in (over the whole batch).

    Args:
        num_tokens: M.
        group_size: g; all tokens are one group where there are fewer.
        n_iter: rounds of refinement in training; the gradient goes through the last one.
    """

    means: Tensor
    initted: Tensor

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        mlp_dim: int,
        num_heads: int,
        *,
        num_tokens: int,
        group_size: int,
        n_iter: int,
    ) -> None:
        super().__init__()
        self.group_size, self.n_iter, self.num_heads = group_size, n_iter, num_heads
        self.parts = (qk_dim, qk_dim, dim)
        self.width, self.scale = head_width(qk_dim, dim, num_heads), (qk_dim // num_heads) ** -0.5
        self.register_buffer("means", torch.randn(num_tokens, dim))
        self.register_buffer("initted", torch.tensor(False))
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, sum(self.parts), bias=False)
        self.centre_kv = nn.Linear(dim, qk_dim + dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.merge = nn.Linear(dim, dim, bias=False)
        self.mlp = ConvFFN(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        tokens = self.norm(x.flatten(1, 2))
        centres = self.centres(tokens)
        order = nearest(tokens, centres).argsort(dim=-1, stable=True)
        if self.training:
            self._follow(centres.detach())
        x = x + self.mixed(tokens, centres.to(tokens.dtype), order).view(x.shape)
        return x + self.mlp(x)

    def groups(self, x: Tensor) -> Tensor:
        """The centre `(B, H, W)` that each token of `(B, H, W, C)` goes to."""
        tokens = self.norm(x.flatten(1, 2))
        return nearest(tokens, self.centres(tokens)).view(x.shape[:3])

    def mixed(self, tokens: Tensor, centres: Tensor, order: Tensor) -> Tensor:
        """Attention of tokens `(B, N, C)` to those beside them in `order` `(B, N)`, and to the centres."""
        batch, number, _ = tokens.shape
        size = min(number, self.group_size)
        count = -(-number // size)
        places = order[:, mirrored(number, (count + 1) * size, order.device)]
        weight = to_heads(self.qkv, self.parts, self.num_heads, self.width)
        qkv = F.linear(taken(tokens, places), weight)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.width)).unbind(2)
        q = q[:, : count * size]  # (B, N', heads, width)
        near = attend(
            windows(q, size, size), windows(k, 2 * size, size), windows(v, 2 * size, size), scale=self.scale
        )
        far = attend(q.transpose(1, 2), *self.centre_heads(centres, batch), scale=self.scale)
        out = near.transpose(1, 2).reshape(batch, count * size, -1) + far.transpose(1, 2).flatten(2)
        out = F.linear(out, from_heads(matrix(self.merge) @ matrix(self.proj), self.num_heads, self.width))
        places = torch.arange(number, device=order.device).expand_as(order)
        return taken(out, torch.empty_like(order).scatter_(1, order, places))

    def centre_heads(self, centres: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the centres, each `(B, heads, M, width)`, the same for all images."""
        weight = to_heads(self.centre_kv, self.parts[1:], self.num_heads, self.width)
        heads = F.linear(centres, weight).unflatten(-1, (2, self.num_heads, self.width))
        k, v = heads.permute(1, 2, 0, 3)[:, None].expand(-1, batch, -1, -1, -1)
        return k, v

    # ---- centres ----

    def centres(self, tokens: Tensor) -> Tensor:
        """The centres `(M, C)` for normalised tokens `(B, N, C)`, in float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            start = torch.where(self.initted, self.means.to(tokens.dtype), self.run_means(tokens))
            return self._refined(tokens, start.detach()) if self.training else start

    def run_means(self, tokens: Tensor) -> Tensor:
        """Means `(M, C)` of M runs of consecutive tokens, over all images; the last tokens follow in reverse.

        In training, over the images of all processes.
        """
        number, count = tokens.shape[1], len(self.means)
        total = number + count - number % count
        runs = tokens[:, mirrored(number, total, tokens.device)].unflatten(1, (count, -1))
        means = runs.mean((0, 2))
        if self.training and (processes := world_size()) > 1:
            means = all_reduce(means) / processes
        return means

    def _refined(self, tokens: Tensor, centres: Tensor) -> Tensor:
        rows = F.normalize(tokens, dim=-1).flatten(0, 1)
        with torch.no_grad():
            for _ in range(self.n_iter - 1):
                centres = refined(rows, centres)
        return refined(rows, centres)

    @torch.no_grad()
    def _follow(self, centres: Tensor) -> None:
        centres = centres.to(self.means.dtype)
        self.means.copy_(torch.where(self.initted, DECAY * self.means + (1 - DECAY) * centres, centres))
        self.initted.fill_(True)


def refined(rows: Tensor, centres: Tensor) -> Tensor:
    """One round: unit sums `(M, C)` of the unit tokens `(R, C)` nearest to each centre, of all processes.

    A centre that no token is nearest to keeps its direction.
    """
    centres = F.normalize(centres, dim=-1)
    members = F.one_hot((rows.detach() @ centres.T).argmax(-1), len(centres)).to(rows.dtype)
    sums, counts = members.T @ rows, members.sum(0)
    if world_size() > 1:
        sums = all_reduce(sums)
        dist.all_reduce(counts)
    return torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), centres)


@torch.no_grad()
def nearest(tokens: Tensor, centres: Tensor) -> Tensor:
    """The centre `(B, N)` with the largest cosine to each token `(B, N, C)`, the first of equals."""
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(centres, dim=-1)
        return (F.normalize(tokens.to(unit.dtype), dim=-1) @ unit.T).argmax(-1)


def mirrored(number: int, total: int, device: torch.device) -> Tensor:
    """Numbers `(total,)`: 0, 1, ... number - 1, then backwards to 0, and so on."""
    place = torch.arange(total, device=device) % (2 * number)
    return torch.minimum(place, 2 * number - 1 - place)


def windows(x: Tensor, size: int, step: int) -> Tensor:
    """Runs `(T, heads, size, d)` of `x` `(B, N, heads, d)`, one every `step` tokens; a view for one image."""
    runs = x.unfold(1, size, step).permute(0, 1, 4, 2, 3)
    return runs.reshape(-1, size, *x.shape[2:]).transpose(1, 2)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows `(B, n, C)` of `x` `(B, N, C)` by `index` `(B, n)`."""
    offset = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1)[(index + offset).flatten()].view(*index.shape, -1)


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
