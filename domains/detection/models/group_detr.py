"""Group DETR (Chen et al. 2022) on Conditional DETR (Meng et al. 2021).

Training runs G groups of N queries through one decoder: they share all weights, do not see each other, and
are matched with the objects group by group, so that every object trains G queries. Evaluation uses the first
group.

Shapes: B images, S = H W tokens of the map, Q queries (G N in training, N in evaluation), d width, L decoder
layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.detection.models.common import MLP, PIXEL_MEAN, PIXEL_STD, full, inverse_sigmoid, sine_embedding
from domains.detection.models.conditional import DecoderLayer, reset_transformer
from domains.detection.models.detector import Outputs, box_heads, pack
from domains.detection.models.single_scale import SingleScaleDetector
from domains.detection.weights.group_detr import GroupDETROfficial
from zoo.attention import Pattern
from zoo.registry import register_model


class Decoder(nn.Module):
    """Layers that share the scale of the position, the reference point head and the final norm."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, ffn_dim, dropout, with_pos=i == 0) for i in range(num_layers)
        )
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(dim, dim, 2, 2)
        self.norm = nn.LayerNorm(dim)
        reset_transformer(self)


class GroupDETR(SingleScaleDetector):
    """Conditional DETR whose training uses several groups of queries; one group is Conditional DETR itself.

    Padding is not neutral: padded pixels become non-zero inside of the backbone and reach over the border of
    the image, so that a batch of mixed sizes gives other results than its images alone (in the official
    program, too). Given the backbone's maps, what stands in padded cells changes nothing.
    """

    def make_decoder(
        self, embed_dim: int, num_heads: int, ffn_dim: int, num_layers: int, dropout: float
    ) -> None:
        self.decoder = Decoder(embed_dim, num_heads, ffn_dim, num_layers, dropout)
        self.query_embed = nn.Embedding(self.num_queries * self.groups, embed_dim)
        self.class_embed, self.bbox_embed = box_heads(embed_dim, self.num_classes)

    def decode(self, memory: Tensor, pos: Tensor, pattern: Pattern | None, auxiliary: bool) -> Outputs:
        groups, decoder = self.active_groups, self.decoder
        query_pos = self.query_embed.weight[None, : groups * self.num_queries]
        # Points are positions in the image: in full precision.
        points = full(decoder.ref_point_head(query_pos)).sigmoid()
        embedding = sine_embedding(points, memory.shape[-1] // 2)
        content, contents = None, []
        for i, layer in enumerate(decoder.layers):
            sine = embedding if content is None else embedding * decoder.query_scale(content)
            content = self.run(layer, content, query_pos, sine, memory, pos, pattern, groups)
            if auxiliary or i == len(decoder.layers) - 1:
                contents.append(content)
        found = decoder.norm(torch.stack(contents))
        boxes = full(self.bbox_embed(found)) + F.pad(inverse_sigmoid(points), (0, 2))
        return pack(full(self.class_embed(found)), boxes.sigmoid())


# ---- variants ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {
    "model": GroupDETR,
    "licence": "Apache-2.0",
    "preprocessing": {"mean": PIXEL_MEAN, "std": PIXEL_STD, "channels": "RGB", "short": 800, "long": 1333},
    "official": GroupDETROfficial,
}
GROUPED: dict[str, Any] = ABOUT | {
    "paper": "Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment (Chen, Chen, Zeng, "
    "Wang et al.; ICCV 2023, arXiv 2207.13085)",
    "source": "https://github.com/Atten4Vis/ConditionalDETR/tree/GroupDETR",
}
CONDITIONAL: dict[str, Any] = ABOUT | {
    "paper": "Conditional DETR for Fast Training Convergence (Meng, Chen, Fan, Zeng, Li, Yuan, Sun, Wang; "
    "ICCV 2021, arXiv 2108.06152)",
    "source": "https://github.com/Atten4Vis/ConditionalDETR",
}


@register_model(
    summary="Group DETR, ResNet-50, 11 groups of 300 queries",
    status="official parity",
    **GROUPED,
)
def group_detr_r50(*, backbone: str = "resnet50", **options: Any) -> GroupDETR:
    return GroupDETR(backbone=backbone, **options)


@register_model(
    summary="Group DETR, ResNet-101, 11 groups of 300 queries",
    status="official parity",
    **GROUPED,
)
def group_detr_r101(*, backbone: str = "resnet101", **options: Any) -> GroupDETR:
    return GroupDETR(backbone=backbone, **options)


@register_model(
    summary="Group DETR, ResNet-50 at stride 16 (DC5), 11 groups of 300 queries",
    status="official parity",
    **GROUPED,
)
def group_detr_r50_dc5(*, backbone: str = "resnet50", dilation: bool = True, **options: Any) -> GroupDETR:
    return GroupDETR(backbone=backbone, dilation=dilation, **options)


@register_model(
    summary="Group DETR, ResNet-101 at stride 16 (DC5), 11 groups of 300 queries",
    status="official parity",
    **GROUPED,
)
def group_detr_r101_dc5(*, backbone: str = "resnet101", dilation: bool = True, **options: Any) -> GroupDETR:
    return GroupDETR(backbone=backbone, dilation=dilation, **options)


@register_model(
    summary="Conditional DETR, ResNet-50: one group of 300 queries",
    status="official parity",
    **CONDITIONAL,
)
def conditional_detr_r50(*, groups: int = 1, backbone: str = "resnet50", **options: Any) -> GroupDETR:
    return GroupDETR(groups=groups, backbone=backbone, **options)


@register_model(
    summary="Conditional DETR, ResNet-101: one group of 300 queries",
    status="official parity",
    **CONDITIONAL,
)
def conditional_detr_r101(*, groups: int = 1, backbone: str = "resnet101", **options: Any) -> GroupDETR:
    return GroupDETR(groups=groups, backbone=backbone, **options)


@register_model(
    summary="Conditional DETR, ResNet-50 at stride 16 (DC5): one group of 300 queries",
    status="official parity",
    **CONDITIONAL,
)
def conditional_detr_r50_dc5(
    *, groups: int = 1, backbone: str = "resnet50", dilation: bool = True, **options: Any
) -> GroupDETR:
    return GroupDETR(groups=groups, backbone=backbone, dilation=dilation, **options)


@register_model(
    summary="Conditional DETR, ResNet-101 at stride 16 (DC5): one group of 300 queries",
    status="official parity",
    **CONDITIONAL,
)
def conditional_detr_r101_dc5(
    *, groups: int = 1, backbone: str = "resnet101", dilation: bool = True, **options: Any
) -> GroupDETR:
    return GroupDETR(groups=groups, backbone=backbone, dilation=dilation, **options)


@register_model(
    summary="A small Group DETR, to train from scratch on a CPU: 3 groups of 20 queries of 64 channels",
    status="re-implementation",
    **GROUPED,
)
def group_detr_mini(
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
) -> GroupDETR:
    if backbone == "resnet_mini" and backbone_options is None:
        backbone_options = {"norm": "batch", "frozen_stages": 0}
    return GroupDETR(
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
