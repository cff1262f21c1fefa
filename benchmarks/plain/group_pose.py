"""Group Pose (arXiv 2308.07313) in the plain layout: the peer of `zoo bench suite=detection`.

The same function as `domains.detection.models.group_pose`, laid out as its official program is described: one
`grid_sample` for each map in deformable attention and a stack of what was sampled, norms of the backbone by
themselves, a projection for every part, explicit attention weights, poses of all cells, every layer's heads.
Parameters carry the official names, so an official state dict loads as it is.

Shapes: B images, S cells of all maps, N instances, K keypoints, T = K + 1 tokens, d width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

HEADS, POINTS, LEVELS = 8, 4, 4
Shapes = list[tuple[int, int]]


def sine(x: Tensor, channels: int, temperature: float) -> Tensor:
    """Angles `(...)` to `(..., channels)`."""
    i = torch.arange(channels, dtype=torch.float32, device=x.device)
    angles = x[..., None] / temperature ** (2 * torch.div(i, 2, rounding_mode="floor") / channels)
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(-2)


def map_position(mask: Tensor, dim: int) -> Tensor:
    """`(B, H, W)`, True = padding, to `(B, d, H, W)`."""
    y, x = (~mask).cumsum(1, dtype=torch.float32), (~mask).cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat((sine(y, dim // 2, 20), sine(x, dim // 2, 20)), -1).permute(0, 3, 1, 2)


def point_position(points: Tensor) -> Tensor:
    """`(..., 2)` to `(..., 256)`."""
    x, y = (sine(part * 2 * math.pi, 128, 10000) for part in points.unbind(-1))
    return torch.cat((y, x), -1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


class MLP(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == len(self.layers) - 1 else F.relu(layer(x))
        return x


def sample(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """values `(B, S, H, D)`, locations `(B, Q, H, L, P, 2)`, weights `(B, Q, H, L, P)` to `(B, Q, H D)`."""
    batch, queries, heads = weights.shape[:3]
    grids, sampled = 2 * locations - 1, []
    for level, part in enumerate(values.split([h * w for h, w in shapes], 1)):
        image = part.flatten(2).transpose(1, 2).reshape(batch * heads, -1, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1)
    return out.view(batch, -1, queries).transpose(1, 2).contiguous()


class Deformable(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        places = HEADS * LEVELS * POINTS
        self.sampling_offsets, self.attention_weights = nn.Linear(dim, 2 * places), nn.Linear(dim, places)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self, query: Tensor, references: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor
    ) -> Tensor:
        values = self.value_proj(memory).masked_fill(mask[..., None], 0.0).unflatten(-1, (HEADS, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, LEVELS, POINTS, 2))
        weights = self.attention_weights(query).unflatten(-1, (HEADS, LEVELS * POINTS)).softmax(-1)
        sizes = query.new_tensor([(w, h) for h, w in shapes])
        locations = references[:, :, None, :, None] + offsets / sizes[:, None]
        return self.output_proj(sample(values, shapes, locations, weights.unflatten(-1, (LEVELS, POINTS))))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = Deformable(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, pos: Tensor, references: Tensor, shapes: Shapes, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + pos, references, x, shapes, mask))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.within_attn, self.across_attn = (nn.MultiheadAttention(dim, HEADS) for _ in range(2))
        self.cross_attn = Deformable(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.within_norm, self.across_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, pos: Tensor, references: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor
    ) -> Tensor:
        """x `(B, N, T, d)`, changed in place as by the official program; pos `(B, N, K, d)`."""
        batch, count, tokens, _ = x.shape
        x[:, :, 1:] += pos
        rows = x.flatten(0, 1).transpose(0, 1)
        x = self.within_norm(x + self.within_attn(rows, rows, rows)[0].transpose(0, 1).view_as(x))
        rows = x.transpose(1, 2).flatten(0, 1).transpose(0, 1)
        across = self.across_attn(rows, rows, rows)[0].transpose(0, 1).unflatten(0, (batch, tokens))
        x = self.across_norm(x + across.transpose(1, 2))
        x[:, :, 1:] += pos
        found = self.cross_attn(x.flatten(1, 2), references, memory, shapes, mask)
        x = self.norm1(x + found.view(batch, count, tokens, -1))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class Encoder(nn.Module):
    def __init__(self, dim: int, ffn: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, ffn) for _ in range(depth))


class Decoder(nn.Module):
    def __init__(self, dim: int, ffn: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, ffn) for _ in range(depth))
        self.half_pose_ref_point_head = MLP(dim, dim, dim)
        self.class_embed = nn.ModuleList(nn.Linear(dim, 2) for _ in range(depth))
        self.pose_embed = nn.ModuleList(MLP(dim, dim, dim, 2) for _ in range(depth))


class Transformer(nn.Module):
    def __init__(self, dim: int, ffn: int, depth: int, keypoints: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(dim, ffn, depth), Decoder(dim, ffn, depth)
        self.level_embed = nn.Parameter(torch.empty(LEVELS, dim))
        self.keypoint_embedding, self.instance_embedding = nn.Embedding(keypoints, dim), nn.Embedding(1, dim)
        self.enc_output, self.enc_output_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.enc_out_class_embed = nn.Linear(dim, 2)
        self.enc_pose_embed = MLP(dim, 2 * dim, 2 * dim, 2 * dim, 2 * keypoints)


class PlainGroupPose(nn.Module):
    """Images `(B, 3, H, W)` with mask `(B, H, W)`, True = padding, to logits and keypoints of every layer."""

    def __init__(self, dim: int = 256, ffn: int = 2048, depth: int = 6, keypoints: int = 17) -> None:
        super().__init__()
        net = resnet50(norm_layer=FrozenBatchNorm2d)
        body = IntermediateLayerGetter(net, {"layer2": "0", "layer3": "1", "layer4": "2"})
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        convs = [nn.Conv2d(width, dim, 1) for width in (512, 1024, 2048)]
        convs.append(nn.Conv2d(2048, dim, 3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, dim)) for conv in convs)
        self.transformer = Transformer(dim, ffn, depth, keypoints)
        self.class_embed = self.transformer.decoder.class_embed
        self.pose_embed = self.transformer.decoder.pose_embed
        self.num_queries, self.num_keypoints = 100, keypoints

    def forward(self, images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        features = list(self.backbone[0]["body"](images).values())  # pyright: ignore[reportIndexIssue]
        maps = [project(x) for project, x in zip(self.input_proj, [*features, features[-1]], strict=True)]
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        masks = [F.interpolate(mask[None].float(), size=shape)[0].bool() for shape in shapes]
        valid = torch.stack([self._valid(m) for m in masks], 1)
        flat, memory = torch.cat([m.flatten(1) for m in masks], 1), self._encoded(maps, masks, valid, shapes)
        content, points = self._proposed(memory, masks, flat, shapes)
        return self._decoded(content, points, memory, valid, shapes, flat)

    @staticmethod
    def _valid(mask: Tensor) -> Tensor:
        return torch.stack(((~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)), -1)

    def _encoded(self, maps: list[Tensor], masks: list[Tensor], valid: Tensor, shapes: Shapes) -> Tensor:
        parts = [
            map_position(mask, maps[0].shape[1]).flatten(2).transpose(1, 2) + embed
            for mask, embed in zip(masks, self.transformer.level_embed, strict=True)
        ]
        references = []
        for level, (h, w) in enumerate(shapes):
            y, x = torch.meshgrid(
                *(torch.arange(n, device=valid.device) + 0.5 for n in (h, w)), indexing="ij"
            )
            y = y.reshape(-1)[None] / (valid[:, None, level, 1] * h)
            x = x.reshape(-1)[None] / (valid[:, None, level, 0] * w)
            references.append(torch.stack((x, y), -1))
        references = torch.cat(references, 1)[:, :, None] * valid[:, None]
        x, pos = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1), torch.cat(parts, 1)
        flat = torch.cat([m.flatten(1) for m in masks], 1)
        for layer in self.transformer.encoder.layers:
            x = layer(x, pos, references, shapes, flat)
        return x

    def _proposed(
        self, memory: Tensor, masks: list[Tensor], flat: Tensor, shapes: Shapes
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for level, ((h, w), mask) in enumerate(zip(shapes, masks, strict=True)):
            y, x = torch.meshgrid(*(torch.arange(n, device=flat.device) + 0.5 for n in (h, w)), indexing="ij")
            kept = torch.stack(((~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)), -1)
            centre = torch.stack((x, y), -1).view(1, -1, 2) / kept[:, None]
            parts.append(torch.cat((centre, torch.full_like(centre, 0.05 * 2**level)), -1))
        boxes = torch.cat(parts, 1)
        wrong = ~((boxes > 0.01) & (boxes < 0.99)).all(-1) | flat
        centres = torch.log(boxes / (1 - boxes)).masked_fill(wrong[..., None], float("inf"))[..., :2]
        part = self.transformer
        content = part.enc_output_norm(part.enc_output(memory.masked_fill(wrong[..., None], 0.0)))
        scores = part.enc_out_class_embed(content).amax(-1)
        poses = part.enc_pose_embed(content).unflatten(-1, (-1, 2)) + centres[:, :, None]
        best = scores.topk(self.num_queries, dim=1).indices[..., None]
        poses = poses.flatten(2).gather(1, best.expand(-1, -1, 2 * self.num_keypoints)).sigmoid()
        poses = poses.unflatten(-1, (-1, 2))
        return content.gather(1, best.expand(-1, -1, content.shape[-1])), poses

    def _decoded(
        self, content: Tensor, points: Tensor, memory: Tensor, valid: Tensor, shapes: Shapes, mask: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        part = self.transformer
        tokens = part.keypoint_embedding.weight + content[:, :, None]
        instance = part.instance_embedding.weight.expand(*content.shape[:2], -1, -1)
        x, stored, given = torch.cat((instance, tokens), 2), [], [points]
        for layer, head in zip(part.decoder.layers, self.pose_embed, strict=True):
            centred = torch.cat((points.mean(2, keepdim=True), points), 2)
            references = centred[:, :, :, None] * valid[:, None, None]
            pos = part.decoder.half_pose_ref_point_head(point_position(references[:, :, 1:, 0]))
            x = layer(x, pos, references.flatten(1, 2), memory, shapes, mask)
            points = (inverse_sigmoid(points) + head(x[:, :, 1:])).sigmoid()
            stored.append(x)
            given.append(points)
        return [
            (classes(x[:, :, 0]), (inverse_sigmoid(start) + poses(x[:, :, 1:])).sigmoid())
            for classes, poses, x, start in zip(
                self.class_embed, self.pose_embed, stored, given[:-1], strict=True
            )
        ]
