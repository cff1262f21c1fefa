"""Group Conditional DETR (arXiv 2108.06152, 2207.13085) in the plain layout: the peer of
`zoo bench suite=detection`.

The same function as `domains.detection.models.group_detr`, laid out as its official program is described:
tokens before batch, norms of the backbone by themselves, a projection for every part, attention by explicit
weights, every layer's heads, matching layer by layer, image by image and group by group. Parameters carry the
official names, so an official state dict loads as it is.

Shapes: B images, S tokens of the map, Q queries, d width.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d, box_convert, generalized_box_iou


def sine(x: Tensor, channels: int) -> Tensor:
    """Angles `(...)` to `(..., channels)`."""
    i = torch.arange(channels, dtype=torch.float32, device=x.device)
    angles = x[..., None] / 10000 ** (2 * torch.div(i, 2, rounding_mode="floor") / channels)
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(-2)


def map_position(mask: Tensor, dim: int) -> Tensor:
    """`(B, H, W)`, True = padding, to `(S, B, d)`."""
    y, x = (~mask).cumsum(1, dtype=torch.float32), (~mask).cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat((sine(y, dim // 2), sine(x, dim // 2)), -1).flatten(1, 2).transpose(0, 1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


class MLP(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == len(self.layers) - 1 else F.relu(layer(x))
        return x


class Projected(nn.Module):
    """Attention of what has been projected already: weights, values and the output layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.out_proj = heads, nn.Linear(dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q `(Q, B, D)`, k `(S, B, D)`, v `(S, B, d)`; mask `(B, S)`, True = padding."""
        count, batch, width = q.shape
        scale = (width // self.heads) ** -0.5
        q, k, v = (
            x.contiguous().view(len(x), batch * self.heads, -1).transpose(0, 1) for x in (q * scale, k, v)
        )
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            scores = scores.view(batch, self.heads, count, -1)
            scores = scores.masked_fill(mask[:, None, None], float("-inf")).flatten(0, 1)
        out = torch.bmm(scores.softmax(-1), v).transpose(0, 1).contiguous()
        return self.out_proj(out.view(count, batch, -1))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        q = x + pos
        x = self.norm1(x + self.self_attn(q, q, x, key_padding_mask=mask)[0])
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: int, first: bool) -> None:
        super().__init__()
        names = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"]
        names += ["ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"]
        for name in [*names, *(["ca_qpos"] if first else [])]:
            self.add_module(f"{name}_proj", nn.Linear(dim, dim))
        self.heads, self.first = heads, first
        self.self_attn, self.cross_attn = Projected(dim, heads), Projected(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def project(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(f"{name}_proj")(x)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        sine: Tensor,
        memory: Tensor,
        pos: Tensor,
        mask: Tensor,
        groups: int,
    ) -> Tensor:
        q = self.project("sa_qcontent", x) + self.project("sa_qpos", query_pos)
        k = self.project("sa_kcontent", x) + self.project("sa_kpos", query_pos)
        v = self.project("sa_v", x)
        q, k, v = (torch.cat(y.chunk(groups), 1) for y in (q, k, v))
        x = self.norm1(x + torch.cat(self.self_attn(q, k, v).chunk(groups, 1)))
        q, k = self.project("ca_qcontent", x), self.project("ca_kcontent", memory)
        v, k_pos = self.project("ca_v", memory), self.project("ca_kpos", pos)
        if self.first:
            q, k = q + self.project("ca_qpos", query_pos), k + k_pos
        q = self.beside(q, self.project("ca_qpos_sine", sine))
        x = self.norm2(x + self.cross_attn(q, self.beside(k, k_pos), v, mask))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))

    def beside(self, a: Tensor, b: Tensor) -> Tensor:
        """Head by head, `(N, B, 2 d)`."""
        return torch.cat((a.unflatten(-1, (self.heads, -1)), b.unflatten(-1, (self.heads, -1))), -1).flatten(
            2
        )


class PlainGroupDETR(nn.Module):
    def __init__(
        self, classes: int = 91, queries: int = 300, groups: int = 11, layers: int = 6, dim: int = 256
    ) -> None:
        super().__init__()
        body = resnet50(norm_layer=FrozenBatchNorm2d)
        del body.fc
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        self.queries, self.groups = queries, groups
        encoder, decoder = nn.Module(), nn.Module()
        encoder.layers = nn.ModuleList(EncoderLayer(dim, 8, 2048) for _ in range(layers))
        decoder.layers = nn.ModuleList(DecoderLayer(dim, 8, 2048, i == 0) for i in range(layers))
        decoder.query_scale, decoder.ref_point_head = MLP((dim, dim, dim)), MLP((dim, dim, 2))
        decoder.norm = nn.LayerNorm(dim)
        self.transformer = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        self.input_proj = nn.Conv2d(2048, dim, 1)
        self.query_embed = nn.Embedding(queries * groups, dim)
        self.class_embed, self.bbox_embed = nn.Linear(dim, classes), MLP((dim, dim, dim, 4))

    def features(self, x: Tensor) -> Tensor:
        body: Any = self.backbone[0].get_submodule("body")
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        return body.layer4(body.layer3(body.layer2(body.layer1(x))))

    def forward(self, images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits and boxes of every layer; all groups in training."""
        features = self.features(images)
        mask = F.interpolate(mask[None].float(), features.shape[-2:])[0].bool()
        x = self.input_proj(features).flatten(2).permute(2, 0, 1)
        encoder: Any = self.transformer["encoder"]
        decoder: Any = self.transformer["decoder"]
        pos, mask = map_position(mask, x.shape[-1]), mask.flatten(1)
        for layer in encoder.layers:
            x = layer(x, pos, mask)
        groups = self.groups if self.training else 1
        query_pos = self.query_embed.weight[: self.queries * groups, None].repeat(1, len(images), 1)
        points = decoder.ref_point_head(query_pos).sigmoid()
        angles = points * 2 * math.pi
        embedding = torch.cat((sine(angles[..., 1], 128), sine(angles[..., 0], 128)), -1)
        content, found = torch.zeros_like(query_pos), []
        for i, layer in enumerate(decoder.layers):
            scaled = embedding if i == 0 else embedding * decoder.query_scale(content)
            content = layer(content, query_pos, scaled, x, pos, mask, groups)
            out = decoder.norm(content).transpose(0, 1)
            raw = self.bbox_embed(out)
            raw[..., :2] += inverse_sigmoid(points.transpose(0, 1))
            found.append((self.class_embed(out), raw.sigmoid()))
        return found


def match(
    found: list[tuple[Tensor, Tensor]], targets: list[dict[str, Tensor]], groups: int
) -> list[list[tuple[Tensor, Tensor]]]:
    """Pairs of query and target of every layer and image, each problem copied and solved by itself."""
    return [
        [_matched(logits[i], boxes[i], target, groups) for i, target in enumerate(targets)]
        for logits, boxes in found
    ]


def _matched(logits: Tensor, boxes: Tensor, target: dict[str, Tensor], groups: int) -> tuple[Tensor, Tensor]:
    p = logits.sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    corners, true = (box_convert(x, "cxcywh", "xyxy") for x in (boxes, target["boxes"]))
    cost = 2 * (positive - negative)[:, target["labels"]] + 5 * torch.cdist(boxes, target["boxes"], p=1)
    cost = cost - 2 * generalized_box_iou(corners, true)
    pairs = [linear_sum_assignment(part) for part in cost.detach().cpu().chunk(groups)]
    size = len(logits) // groups
    queries = torch.cat([torch.as_tensor(q) + size * g for g, (q, _) in enumerate(pairs)])
    return queries, torch.cat([torch.as_tensor(t) for _, t in pairs])


def loss(found: list[tuple[Tensor, Tensor]], targets: list[dict[str, Tensor]], groups: int) -> Tensor:
    """Weighted sum over layers: focal, L1 and generalised IoU, layer by layer."""
    count = max(1, groups * sum(len(target["labels"]) for target in targets))
    total = torch.zeros(())
    for (logits, boxes), pairs in zip(found, match(found, targets, groups), strict=True):
        classes, chosen, true = torch.zeros_like(logits), [], []
        for i, ((query, at), target) in enumerate(zip(pairs, targets, strict=True)):
            classes[i, query, target["labels"][at]] = 1
            chosen.append(boxes[i, query])
            true.append(target["boxes"][at])
        a, b = torch.cat(chosen), torch.cat(true)
        p = logits.sigmoid()
        bce = F.binary_cross_entropy_with_logits(logits, classes, reduction="none")
        right = p * classes + (1 - p) * (1 - classes)
        focal = (0.25 * classes + 0.75 * (1 - classes)) * bce * (1 - right) ** 2
        giou = generalized_box_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))
        parts = 2 * focal.sum(), 5 * F.l1_loss(a, b, reduction="sum"), 2 * (1 - giou.diag()).sum()
        total = total.to(logits.device) + sum(parts) / count
    return total
