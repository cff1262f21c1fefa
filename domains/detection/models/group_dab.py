"""DAB-DETR (Liu et al. 2022, arXiv 2201.12329) with groups of queries (Chen et al. 2022).

Queries are boxes (anchors) that every layer moves. Their sine encoding is the position of the query; its
first half scores against the positions of the map, sharpened or widened by the box's size (section 4.4).

Shapes: B images, S tokens of the map, Q queries of all groups, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from domains.detection.models.common import MLP, PIXEL_MEAN, PIXEL_STD, full, inverse_sigmoid, sine_embedding
from domains.detection.models.conditional import DecoderLayer, reset_transformer
from domains.detection.models.detector import Outputs, box_heads, pack
from domains.detection.models.single_scale import SingleScaleDetector
from zoo.attention import Pattern
from zoo.registry import register_model

SMALLEST = 1e-3
"""Side of a box that scores are divided by."""


class Decoder(nn.Module):
    """Layers that share what makes positions, scales and sizes of their queries, and the final norm."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, ffn_dim, dropout, with_pos=i == 0, activation=nn.PReLU())
            for i in range(num_layers)
        )
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.ref_size_head = MLP(dim, dim, 2, 2)
        self.norm = nn.LayerNorm(dim)
        reset_transformer(self)

    def positions(self, boxes: Tensor, content: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """Of boxes `(B or 1, Q, 4)`: position of the query and what scores against the map's, `(..., d)`.

        The row's half of the latter is multiplied by h' / h, the column's by w' / w, with w', h' predicted
        from the content (eq. 6); content None stands for zeros.
        """
        dim = self.norm.normalized_shape[0]
        embedding = sine_embedding(boxes, dim // 2, temperature)
        scores = embedding[..., :dim]
        if content is not None:
            scores = scores * self.query_scale(content)
        seen = boxes.new_zeros(1, 1, dim) if content is None else content
        ratio = full(self.ref_size_head(seen)).sigmoid() / boxes[..., 2:].clamp(min=SMALLEST)
        rows, columns = scores.chunk(2, -1)
        scores = torch.cat([rows * ratio[..., 1:], columns * ratio[..., :1]], -1)
        return self.ref_point_head(embedding), scores


class GroupDAB(SingleScaleDetector):
    """DAB-DETR whose training uses several groups of anchors; one group is DAB-DETR itself.

    Written from the paper: one box head for all layers, gradients stop at the box that a layer is given,
    positions with a temperature of 20, PReLU.
    """

    temperature = 20.0

    def activation(self) -> nn.Module:
        return nn.PReLU()

    def make_decoder(
        self, embed_dim: int, num_heads: int, ffn_dim: int, num_layers: int, dropout: float
    ) -> None:
        self.decoder = Decoder(embed_dim, num_heads, ffn_dim, num_layers, dropout)
        self.anchor_embed = nn.Embedding(self.num_queries * self.groups, 4)
        self.class_embed, self.bbox_embed = box_heads(embed_dim, self.num_classes)

    def decode(self, memory: Tensor, pos: Tensor, pattern: Pattern | None, auxiliary: bool) -> Outputs:
        groups, decoder = self.active_groups, self.decoder
        boxes = full(self.anchor_embed.weight[None, : groups * self.num_queries]).sigmoid()
        content, found, moved = None, [], []
        for i, layer in enumerate(decoder.layers):
            query_pos, sine = decoder.positions(boxes, content, self.temperature)
            content = self.run(layer, content, query_pos, sine, memory, pos, pattern, groups)
            normed = decoder.norm(content)
            refined = (full(self.bbox_embed(normed)) + inverse_sigmoid(boxes)).sigmoid()
            if auxiliary or i == len(decoder.layers) - 1:
                found.append(normed)
                moved.append(refined)
            boxes = refined.detach()
        return pack(full(self.class_embed(torch.stack(found))), torch.stack(moved))


# ---- variants ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {
    "model": GroupDAB,
    "paper": "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR (Liu, Li, Zhang, Yang, Qi, Su, Zhu, "
    "Zhang; ICLR 2022, arXiv 2201.12329), with the groups of Group DETR (arXiv 2207.13085)",
    "licence": "Apache-2.0",
    "source": "https://github.com/IDEA-Research/DAB-DETR",
    "status": "re-implementation",
    "preprocessing": {"mean": PIXEL_MEAN, "std": PIXEL_STD, "channels": "RGB", "short": 800, "long": 1333},
}


@register_model(summary="Group DAB-DETR, ResNet-50, 11 groups of 300 anchors", **ABOUT)
def group_dab_r50(*, dropout: float = 0.0, **options: Any) -> GroupDAB:
    return GroupDAB(dropout=dropout, **options)


@register_model(summary="DAB-DETR, ResNet-50: one group of 300 anchors", **ABOUT)
def dab_detr_r50(*, groups: int = 1, dropout: float = 0.0, **options: Any) -> GroupDAB:
    return GroupDAB(groups=groups, dropout=dropout, **options)


@register_model(
    summary="A small Group DAB-DETR, to train from scratch on a CPU: 3 groups of 20 anchors, 64 channels",
    **ABOUT,
)
def group_dab_mini(
    *,
    num_queries: int = 20,
    groups: int = 3,
    backbone: str = "resnet_mini",
    backbone_options: dict[str, Any] | None = None,
    embed_dim: int = 64,
    num_heads: int = 4,
    enc_layers: int = 1,
    dec_layers: int = 2,
    ffn_dim: int = 128,
    dropout: float = 0.0,
    **options: Any,
) -> GroupDAB:
    if backbone == "resnet_mini" and backbone_options is None:
        backbone_options = {"norm": "batch", "frozen_stages": 0}
    return GroupDAB(
        num_queries=num_queries,
        groups=groups,
        backbone=backbone,
        backbone_options=backbone_options,
        embed_dim=embed_dim,
        num_heads=num_heads,
        enc_layers=enc_layers,
        dec_layers=dec_layers,
        ffn_dim=ffn_dim,
        dropout=dropout,
        **options,
    )
