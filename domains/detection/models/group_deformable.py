"""Two-stage Deformable DETR (Zhu et al. 2021) with groups of queries, as LW-DETR has them (Chen et al. 2024).

Every group has its own head on the encoder's cells and starts from the N boxes that this head likes best
(mixed query selection, Zhang et al. 2023: boxes from the image, content learned). The decoder is shared,
groups do not see each other, and evaluation uses the first. With denoising and with layers that learn from
the box of the next one (look forward twice) it is DINO.

Shapes: B images, S cells of all L maps, Q queries of all groups, N queries of a group, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domains.detection.models.backbones import create_backbone
from domains.detection.models.common import (
    MLP,
    PIXEL_MEAN,
    PIXEL_STD,
    check_images,
    full,
    inverse_sigmoid,
    sine_embedding,
)
from domains.detection.models.conditional import FFN, EncoderAttention, reset_transformer
from domains.detection.models.denoising import Noised, noised_objects
from domains.detection.models.detector import (
    GroupDetector,
    Outputs,
    Prediction,
    box_heads,
    check_width,
    layers,
    pack,
)
from domains.detection.models.group_pose_layers import (
    Cells,
    EncoderLayer,
    cells_of,
    deformable,
    flatten_maps,
)
from domains.detection.models.multi_scale import GROUPS, positions, projected, projections
from zoo.attention import EqualGroups, Pattern
from zoo.attention.deformable import Shapes
from zoo.errors import ConfigError, DataError
from zoo.registry import register_model

Section = tuple[int, Pattern | None]
"""So many consecutive queries, and who of them sees whom; they see nobody else."""

SIDE = 0.05
"""Of a proposal on the finest map, in parts of the image; doubled from map to map."""


class DecoderLayer(nn.Module):
    """Self-attention within groups, deformable attention to the maps, FFN, each with the norm of the sum."""

    def __init__(
        self, dim: int, num_heads: int, ffn_dim: int, dropout: float, *, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(dim, num_heads, dropout)
        self.cross_attn = deformable(dim, num_heads, num_levels, num_points)
        self.ffn = FFN(dim, ffn_dim, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        reset_transformer(self.ffn)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        real: Tensor | None,
        sections: Sequence[Section],
    ) -> Tensor:
        """`(B, Q, d) -> (B, Q, d)`; boxes as references, `(B, Q, L, 4)`."""
        sizes = [size for size, _ in sections]
        parts = zip(x.split(sizes, 1), pos.split(sizes, 1), sections, strict=True)
        mixed = torch.cat([self.self_attn(part, place, pattern) for part, place, (_, pattern) in parts], 1)
        x = self.norm1(x + self.dropout(mixed))
        values = self.cross_attn.values(memory, real)
        read = self.cross_attn(x + pos, references, values, shapes)
        x = self.norm2(x + self.dropout(read))
        return self.norm3(x + self.dropout(self.ffn(x)))


class ProposalHead(nn.Module):
    """What one group makes of the encoder's cells: the N boxes of the highest class score."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.output, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        reset_transformer(self.output)
        self.class_embed, self.bbox_embed = box_heads(dim, num_classes)

    def forward(self, memory: Tensor, usable: Tensor, proposals: Tensor, count: int) -> Prediction:
        """From memory `(B, S, d)`, bool usable `(B, S)`, proposals `(B, S, 4)` before the sigmoid."""
        x = self.norm(self.output(memory))
        logits = full(self.class_embed(x))
        scores = logits.amax(-1).masked_fill(~usable, -torch.inf)
        best = scores.topk(count, dim=1).indices[..., None]
        parts = (x, proposals, logits)
        x, base, logits = (part.gather(1, best.expand(-1, -1, part.shape[-1])) for part in parts)
        return {"logits": logits, "boxes": (full(self.bbox_embed(x)) + base).sigmoid()}


class GroupDeformable(GroupDetector):
    """Two-stage Deformable DETR whose training uses several groups of queries.

    Args:
        num_classes: C.
        num_queries: N, of a group.
        groups: G, in training.
        backbone: a name that `create_backbone` knows.
        backbone_levels: how many of its last maps are read.
        backbone_options: further arguments of the backbone.
        num_levels: L; further maps are halved by convolutions.
        embed_dim: d, a multiple of 32.
        num_heads: divides d.
        enc_layers, dec_layers: number of layers.
        num_points: places that a head reads of each map.
        ffn_dim: hidden width of the FFNs.
        dropout: of attention weights, branches and FFNs.
        temperature: of sine encodings.
        denoising: pairs of noised objects that training decodes beside the queries; needs `targets`.
        look_forward_twice: the box of a layer also trains the layer before.

    Raises:
        ConfigError: sizes that do not fit together, or an unknown backbone.
    """

    head_modules: tuple[str, ...] = ("proposal_heads", "class_embed", "bbox_embed")

    def __init__(
        self,
        num_classes: int = 91,
        *,
        num_queries: int = 300,
        groups: int = 13,
        backbone: str = "resnet50",
        backbone_levels: int = 3,
        backbone_options: dict[str, Any] | None = None,
        num_levels: int = 4,
        embed_dim: int = 256,
        num_heads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        num_points: int = 4,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        temperature: float = 20.0,
        denoising: int = 0,
        look_forward_twice: bool = False,
    ) -> None:
        super().__init__(num_classes, num_queries, groups)
        check_width(embed_dim, num_heads)
        if embed_dim % GROUPS or num_levels < backbone_levels or dec_layers < 1:
            raise ConfigError(
                f"embed_dim={embed_dim} has to be a multiple of {GROUPS}, num_levels={num_levels} at least "
                f"backbone_levels={backbone_levels}, and dec_layers={dec_layers} at least 1."
            )
        if denoising < 0:
            raise ConfigError(f"denoising is a number of pairs, 0 for none, not {denoising}.")
        self.temperature, self.denoising = temperature, denoising
        self.look_forward_twice = look_forward_twice
        self.backbone = create_backbone(backbone, backbone_levels, **(backbone_options or {}))
        channels: Any = self.backbone.channels
        self.input_proj = projections(channels, embed_dim, num_levels)
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        sizes: Any = (embed_dim, num_heads, ffn_dim, dropout)
        maps = {"num_levels": num_levels, "num_points": num_points}
        self.encoder = nn.ModuleList(EncoderLayer(*sizes, **maps) for _ in range(enc_layers))
        for layer in self.encoder:
            reset_transformer(layer.ffn)  # pyright: ignore[reportArgumentType]
        self.proposal_heads = nn.ModuleList(ProposalHead(embed_dim, num_classes) for _ in range(groups))
        self.query_embed = nn.Embedding(num_queries * groups, embed_dim)
        if denoising:
            self.head_modules = (*self.head_modules, "label_embed")
            self.label_embed = nn.Embedding(num_classes, embed_dim)
        self.ref_point_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        reset_transformer(self.ref_point_head)
        self.decoder = nn.ModuleList(DecoderLayer(*sizes, **maps) for _ in range(dec_layers))
        self.norm = nn.LayerNorm(embed_dim)
        self.class_embed, self.bbox_embed = box_heads(embed_dim, num_classes)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        auxiliary: bool | None = None,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Outputs:
        """Images `(B, 3, H, W)`, normalised, with mask `(B, H, W)`, True = padding, to predictions.

        Args:
            auxiliary: also give the proposals (first) and the predictions of the layers before the last; by
                default in training only.
            targets: of each image, `labels` `(T,)` and `boxes` `(T, 4)`, for denoising in training.

        Raises:
            DataError: images or a mask of another shape, images with fewer cells than queries, or no targets
                where training needs them.
        """
        check_images(images, mask)
        noised = self._noised(targets) if self.training and self.denoising else None
        maps = projected(self.input_proj, self.backbone(images))
        cells = cells_of([(m.shape[2], m.shape[3]) for m in maps], mask, images.device)
        x, pos = flatten_maps(maps), positions(cells, self.level_embed, self.temperature)
        references = cells.references.expand(len(x), -1, -1, -1)
        for layer in self.encoder:
            x = self.run(layer, x, pos, references, cells.shapes, cells.real)
        return self._decode(x, cells, self.training if auxiliary is None else auxiliary, noised)

    def _noised(self, targets: Sequence[Mapping[str, Tensor]] | None) -> Noised | None:
        if targets is None:
            raise DataError("Training with denoising needs targets: model(images, mask, targets=targets).")
        return noised_objects(targets, self.num_classes, self.denoising)

    def _proposed(self, memory: Tensor, cells: Cells) -> Prediction:
        """Of all active groups, `(B, Q, ...)`."""
        if memory.shape[1] < self.num_queries:
            raise DataError(
                f"The maps of these images have {memory.shape[1]} cells in all, too few for "
                f"{self.num_queries} queries: give larger images, or set fewer num_queries."
            )
        usable = cells.proposable().expand(len(memory), -1)
        memory = memory.masked_fill(~usable[..., None], 0.0)
        proposals = proposed_boxes(cells).expand(len(memory), -1, -1)
        heads = list(self.proposal_heads)[: self.active_groups]
        found: list[Prediction] = [head(memory, usable, proposals, self.num_queries) for head in heads]
        return {
            "logits": torch.cat([part["logits"] for part in found], 1),
            "boxes": torch.cat([part["boxes"] for part in found], 1),
        }

    def _decode(self, memory: Tensor, cells: Cells, auxiliary: bool, noised: Noised | None) -> Outputs:
        groups, start = self.active_groups, self._proposed(memory, cells)
        x = self.query_embed.weight[: groups * self.num_queries].expand(len(memory), -1, -1)
        boxes, matched = start["boxes"].detach(), x.shape[1]
        sections: list[Section] = [(matched, EqualGroups(self.num_queries) if groups > 1 else None)]
        if noised is not None:
            x = torch.cat([x, self.label_embed(noised.labels)], 1)
            boxes = torch.cat([boxes, noised.boxes], 1)
            sections.append((noised.labels.shape[1], noised.pattern))
        before, found, moved = boxes, [], []
        valid = cells.valid.repeat(1, 1, 2)[:, None]
        for i, layer in enumerate(self.decoder):
            pos = self.ref_point_head(sine_embedding(boxes, x.shape[-1] // 2, self.temperature))
            references = boxes[:, :, None] * valid
            x = self.run(layer, x, pos, references, memory, cells.shapes, cells.real, sections)
            normed = self.norm(x)
            step = full(self.bbox_embed(normed))
            if auxiliary or i == len(self.decoder) - 1:
                found.append(normed)
                moved.append((step + inverse_sigmoid(before if self.look_forward_twice else boxes)).sigmoid())
            before = (step + inverse_sigmoid(boxes)).sigmoid()
            boxes = before.detach()
        logits, moved = full(self.class_embed(torch.stack(found))), torch.stack(moved)
        outputs = pack(logits[:, :, :matched], moved[:, :, :matched])
        if auxiliary:
            outputs["auxiliary"].insert(0, start)
        if noised is not None:
            repaired = pack(logits[:, :, matched:], moved[:, :, matched:])
            outputs["denoised"] = {"noised": noised, "outputs": layers(repaired)}
        return outputs


def proposed_boxes(cells: Cells) -> Tensor:
    """A square around each cell, (cx, cy, w, h) before the sigmoid: `(B or 1, S, 4)`."""
    counts = [rows * columns for rows, columns in cells.shapes]
    sides = [cells.centres.new_full((count, 2), SIDE * 2**level) for level, count in enumerate(counts)]
    side = torch.cat(sides).clamp(max=0.99).expand_as(cells.centres)
    return torch.cat([cells.centres.clamp(0.01, 0.99), side], -1).logit()


# ---- variants ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {
    "model": GroupDeformable,
    "paper": "Deformable DETR (Zhu et al.; ICLR 2021, arXiv 2010.04159), with the groups of Group DETR "
    "(arXiv 2207.13085) in the form of LW-DETR (arXiv 2406.03459)",
    "licence": "Apache-2.0",
    "source": "https://github.com/fundamentalvision/Deformable-DETR",
    "status": "re-implementation",
    "preprocessing": {"mean": PIXEL_MEAN, "std": PIXEL_STD, "channels": "RGB", "short": 800, "long": 1333},
}
DINO: dict[str, Any] = ABOUT | {
    "paper": f"DINO (Zhang et al.; ICLR 2023, arXiv 2203.03605); {ABOUT['paper']}",
}


@register_model(summary="Two-stage Group Deformable DETR, ResNet-50, 13 groups of 300 queries", **ABOUT)
def group_deformable_r50(**options: Any) -> GroupDeformable:
    return GroupDeformable(**options)


@register_model(
    summary="DINO with groups: ResNet-50, 11 groups of 900 queries, 100 pairs of noised objects",
    **DINO,
)
def group_dino_r50(
    *,
    num_queries: int = 900,
    groups: int = 11,
    denoising: int = 100,
    look_forward_twice: bool = True,
    **options: Any,
) -> GroupDeformable:
    return GroupDeformable(
        num_queries=num_queries,
        groups=groups,
        denoising=denoising,
        look_forward_twice=look_forward_twice,
        **options,
    )


@register_model(
    summary="A small Group Deformable DETR, to train from scratch on a CPU: 3 groups of 20 queries",
    **ABOUT,
)
def group_deformable_mini(
    *,
    num_queries: int = 20,
    groups: int = 3,
    backbone: str = "resnet_mini",
    backbone_levels: int = 2,
    backbone_options: dict[str, Any] | None = None,
    num_levels: int = 3,
    embed_dim: int = 64,
    num_heads: int = 4,
    enc_layers: int = 1,
    dec_layers: int = 2,
    num_points: int = 4,
    ffn_dim: int = 128,
    **options: Any,
) -> GroupDeformable:
    if backbone == "resnet_mini" and backbone_options is None:
        backbone_options = {"norm": "batch", "frozen_stages": 0}
    return GroupDeformable(
        num_queries=num_queries,
        groups=groups,
        backbone=backbone,
        backbone_levels=backbone_levels,
        backbone_options=backbone_options,
        num_levels=num_levels,
        embed_dim=embed_dim,
        num_heads=num_heads,
        enc_layers=enc_layers,
        dec_layers=dec_layers,
        num_points=num_points,
        ffn_dim=ffn_dim,
        **options,
    )
