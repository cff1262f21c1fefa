"""Group Pose (Liu et al. 2023): all people of an image and their keypoints in one pass, without boxes.

Shapes: B images, S cells of all L maps, d width, N instances, K keypoints, T = K + 1 tokens of an instance,
C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from domains.detection.models.backbones import create_backbone
from domains.detection.models.common import (
    MLP,
    PIXEL_MEAN,
    PIXEL_STD,
    best_pairs,
    check_images,
    full,
    inverse_sigmoid,
    sine_embedding,
)
from domains.detection.models.conditional import reset_transformer
from domains.detection.models.detector import Checkpointed, check_width, checked_sizes
from domains.detection.models.group_pose_layers import (
    Cells,
    DecoderLayer,
    EncoderLayer,
    cells_of,
    flatten_maps,
    padded_front,
    with_centre,
)
from domains.detection.models.multi_scale import GROUPS, positions, projected, projections
from domains.detection.weights.group_pose import GroupPoseOfficial
from zoo.attention.layers.deformable import DeformableAttention, values_of
from zoo.errors import ConfigError, DataError
from zoo.registry import register_model

EPS = 1e-3
"""Of `inverse_sigmoid`: a coordinate is refined from within (0.001, 0.999)."""


class PosePrediction(TypedDict):
    """Of one decoder layer, or of the encoder."""

    logits: Tensor
    """`(B, N, C)`, before the sigmoid."""
    keypoints: Tensor
    """`(B, N, K, 2)`: x, y in [0, 1] of the image without padding."""


class PoseOutputs(PosePrediction):
    """Of the last decoder layer, of the encoder, and of the layers before the last where asked for."""

    auxiliary: list[PosePrediction]
    proposals: PosePrediction


class Poses(TypedDict):
    """Of one image, best first."""

    scores: Tensor
    labels: Tensor
    keypoints: Tensor
    """`(n, K, 2)`: x, y in pixels, not clipped."""


class Proposals(NamedTuple):
    """The cells that the decoder starts from."""

    content: Tensor
    """`(B, N, d)`"""
    logits: Tensor
    keypoints: Tensor
    """`(B, N, K, 2)`"""


class GroupPose(Checkpointed):
    """Keypoints as queries: N instances of K keypoints and one token for the instance.

    The encoder's best N cells propose a pose each. Decoder layers attend within instances, then across
    instances to the tokens of the same kind, then to the maps around each keypoint, which is moved.

    Padding is not neutral (nor in the official program): it reaches over the border in the backbone, enters
    the statistics of the group norms, and scales the positions of queries.

    Args:
        num_keypoints: K.
        num_classes: C; in the published models label 1 is a person, and 0 is never matched.
        num_queries: N.
        backbone: a name that `create_backbone` knows.
        backbone_levels: how many of its last maps are read.
        backbone_options: further arguments of the backbone.
        num_levels: L; further maps are halved by convolutions.
        embed_dim: d.
        num_heads: divides d.
        enc_layers, dec_layers: number of layers.
        enc_points, dec_points: places that a head reads of each map.
        ffn_dim: hidden width of the FFNs.
        dropout: of attention weights, branches and FFNs.
        temperature: of the position encoding of maps.
        share_class_head, share_pose_head: one for all decoder layers.
        moved_auxiliary: the keypoint heads of the layers before the last see tokens that the next layer's
            position has been added to, as in the official program, where the two share memory. The last
            layer's predictions are the same without.

    Raises:
        ConfigError: sizes that do not fit together, or an unknown backbone.
    """

    head_modules: tuple[str, ...] = (
        *("enc_class_embed", "enc_pose_embed", "keypoint_embedding"),
        *("class_embed", "pose_embed"),
    )
    """What fine-tuning of the heads alone trains: all that depends on classes and keypoints."""

    def __init__(
        self,
        num_keypoints: int = 17,
        *,
        num_classes: int = 2,
        num_queries: int = 100,
        backbone: str = "resnet50",
        backbone_levels: int = 3,
        backbone_options: dict[str, Any] | None = None,
        num_levels: int = 4,
        embed_dim: int = 256,
        num_heads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        enc_points: int = 4,
        dec_points: int = 4,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        temperature: float = 20.0,
        share_class_head: bool = False,
        share_pose_head: bool = False,
        moved_auxiliary: bool = True,
    ) -> None:
        super().__init__()
        counts = {"num_keypoints": num_keypoints, "num_classes": num_classes, "num_queries": num_queries}
        _check_sizes(counts | {"dec_layers": dec_layers}, embed_dim, num_heads, backbone_levels, num_levels)
        self.num_keypoints, self.num_classes, self.num_queries = counts.values()
        self.temperature, self.moved_auxiliary = temperature, moved_auxiliary
        self.backbone = create_backbone(backbone, backbone_levels, **(backbone_options or {}))
        channels: Any = self.backbone.channels
        self.input_proj = projections(channels, embed_dim, num_levels)
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        sizes: Any = (embed_dim, num_heads, ffn_dim, dropout)
        self.encoder = nn.ModuleList(
            EncoderLayer(*sizes, num_levels=num_levels, num_points=enc_points) for _ in range(enc_layers)
        )
        self.enc_output, self.enc_output_norm = nn.Linear(embed_dim, embed_dim), nn.LayerNorm(embed_dim)
        self.enc_class_embed = nn.Linear(embed_dim, num_classes)
        self.enc_pose_embed = MLP(embed_dim, 2 * embed_dim, 2 * num_keypoints, 4)
        self.keypoint_embedding = nn.Embedding(num_keypoints, embed_dim)
        self.instance_embedding = nn.Embedding(1, embed_dim)
        self.ref_point_head = MLP(embed_dim, embed_dim, embed_dim, 2)
        self.decoder = nn.ModuleList(
            DecoderLayer(*sizes, num_levels=num_levels, num_points=dec_points) for _ in range(dec_layers)
        )
        classes = [nn.Linear(embed_dim, num_classes) for _ in range(1 if share_class_head else dec_layers)]
        poses = [MLP(embed_dim, embed_dim, 2, 3) for _ in range(1 if share_pose_head else dec_layers)]
        self.class_embed = nn.ModuleList(classes[i % len(classes)] for i in range(dec_layers))
        self.pose_embed = nn.ModuleList(poses[i % len(poses)] for i in range(dec_layers))
        self._initialise()

    def _initialise(self) -> None:
        parts = [self.enc_output, self.enc_pose_embed, self.ref_point_head, *self.pose_embed]
        parts += [layer.ffn for layer in (*self.encoder, *self.decoder)]
        for part in parts:
            reset_transformer(part)  # pyright: ignore[reportArgumentType]
        for table in (self.keypoint_embedding, self.instance_embedding):
            nn.init.xavier_uniform_(table.weight)
        for head in (self.enc_class_embed, *self.class_embed):
            nn.init.constant_(head.bias, -math.log(99))  # pyright: ignore[reportArgumentType]
        for head in (self.enc_pose_embed, *self.pose_embed):
            last: Any = head.layers[-1]  # pyright: ignore
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, *, auxiliary: bool | None = None
    ) -> PoseOutputs:
        """Images `(B, 3, H, W)`, normalised, with mask `(B, H, W)`, True = padding, to predictions.

        Args:
            auxiliary: also predict from the layers before the last; by default in training only.

        Raises:
            DataError: images or a mask of another shape, or images with fewer cells than queries.
        """
        check_images(images, mask)
        return self.detect(self.backbone(images), mask, auxiliary=auxiliary)

    def detect(
        self, features: Sequence[Tensor], mask: Tensor | None = None, *, auxiliary: bool | None = None
    ) -> PoseOutputs:
        """From the backbone's maps `(B, C_l, H_l, W_l)`; the mask is that of the images."""
        maps = projected(self.input_proj, features)
        cells = cells_of([(m.shape[2], m.shape[3]) for m in maps], mask, maps[0].device)
        memory = self.encode(flatten_maps(maps), cells)
        auxiliary = self.training if auxiliary is None else auxiliary
        return self.decode(memory, cells, self.propose(memory, cells), auxiliary)

    def encode(self, x: Tensor, cells: Cells) -> Tensor:
        """`(B, S, d)`"""
        pos = positions(cells, self.level_embed, self.temperature).to(x.dtype)
        references = cells.references.expand(len(x), -1, -1, -1)
        for layer in self.encoder:
            x = self.run(layer, x, pos, references, cells.shapes, cells.real)
        return x

    def propose(self, memory: Tensor, cells: Cells) -> Proposals:
        """The N cells of the highest class score, each with a pose around its centre."""
        if memory.shape[1] < self.num_queries:
            raise DataError(
                f"The maps of these images have {memory.shape[1]} cells in all, too few for "
                f"{self.num_queries} queries: give larger images, or build the model with fewer num_queries."
            )
        usable = cells.proposable().expand(len(memory), -1)
        content = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable[..., None], 0.0)))
        logits = self.enc_class_embed(content)
        best = logits.amax(-1).topk(self.num_queries, dim=1).indices[..., None]
        content = content.gather(1, best.expand(-1, -1, content.shape[-1]))
        centres = torch.log(cells.centres / (1 - cells.centres)).expand(len(memory), -1, -1)
        centres = centres.masked_fill(~usable[..., None], torch.inf).gather(1, best.expand(-1, -1, 2))
        moved = full(self.enc_pose_embed(content)).unflatten(-1, (-1, 2)) + centres[:, :, None]
        return Proposals(content, logits.gather(1, best.expand(-1, -1, logits.shape[-1])), moved.sigmoid())

    def decode(self, memory: Tensor, cells: Cells, proposals: Proposals, auxiliary: bool) -> PoseOutputs:
        layers: list[Any] = list(self.decoder)
        attentions: list[DeformableAttention] = [layer.cross_attn for layer in layers]
        values = values_of(attentions, memory, cells.real)
        x = self._tokens(proposals.content.detach())
        before = keypoints = proposals.keypoints.detach()
        outputs: list[PosePrediction] = []
        for i, layer in enumerate(layers):
            references = with_centre(keypoints.detach())[:, :, :, None] * cells.valid[:, None, None]
            pos = self._positions(references[:, :, 1:, 0])
            moved = x + pos
            if i and auxiliary:
                outputs.append(self._predicted(i - 1, moved if self.moved_auxiliary else x, before))
            x = self.run(layer, moved, pos, references.flatten(1, 2), values[i], cells.shapes)
            before = keypoints
            if i < len(layers) - 1:
                keypoints = self._refined(i, x, keypoints.detach())
        final = self._predicted(len(layers) - 1, x, before)
        start: PosePrediction = {"logits": full(proposals.logits), "keypoints": proposals.keypoints}
        return {**final, "auxiliary": outputs, "proposals": start}

    def _tokens(self, content: Tensor) -> Tensor:
        """`(B, N, d)` to `(B, N, T, d)`: the instance token is the same for all."""
        keypoints = self.keypoint_embedding.weight + content[:, :, None]
        instance = self.instance_embedding.weight.expand(*content.shape[:2], -1, -1)
        return torch.cat([instance, keypoints], 2)

    def _positions(self, points: Tensor) -> Tensor:
        """Points `(B, N, K, 2)` to `(B, N, T, d)`."""
        sine = sine_embedding(points, self.level_embed.shape[1] // 2)
        return padded_front(self.ref_point_head(sine))

    def _refined(self, i: int, x: Tensor, keypoints: Tensor) -> Tensor:
        """Keypoints `(B, N, K, 2)`, moved by what layer i says."""
        return (inverse_sigmoid(keypoints, EPS) + full(self.pose_embed[i](x[:, :, 1:]))).sigmoid()

    def _predicted(self, i: int, x: Tensor, keypoints: Tensor) -> PosePrediction:
        """What layer i says; `keypoints` it was given, with their gradient (to the layer before)."""
        logits = full(self.class_embed[i](x[:, :, 0]))
        return {"logits": logits, "keypoints": self._refined(i, x, keypoints)}

    def postprocess(
        self, outputs: PoseOutputs, sizes: Tensor | Sequence[Sequence[int]], k: int = 50
    ) -> list[Poses]:
        """The k best pairs of instance and class of each image; no suppression, no threshold.

        Args:
            outputs: of `forward`.
            sizes: `(B, 2)`, height and width of each image in pixels, without padding.

        Raises:
            DataError: another number of sizes than images.
        """
        best = best_pairs(outputs["logits"], k)
        size = checked_sizes(sizes, best.scores)
        at = best.queries[..., None, None].expand(-1, -1, self.num_keypoints, 2)
        pixels = outputs["keypoints"].gather(1, at) * size.flip(1)[:, None, None]
        return [
            {"scores": scores, "labels": labels, "keypoints": keypoints}
            for scores, labels, keypoints in zip(best.scores, best.labels, pixels, strict=True)
        ]


def _check_sizes(
    counts: dict[str, int], embed_dim: int, num_heads: int, backbone_levels: int, num_levels: int
) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is at least 1, not {value}.")
    check_width(embed_dim, num_heads)
    if embed_dim % GROUPS:
        raise ConfigError(f"The maps are normalised in {GROUPS} groups, which do not divide {embed_dim}.")
    if num_levels < backbone_levels:
        raise ConfigError(f"There are {backbone_levels} maps of the backbone, but num_levels={num_levels}.")


# ---- variants ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {
    "model": GroupPose,
    "paper": "Group Pose: A Simple Baseline for End-to-End Multi-person Pose Estimation (Liu, Chen, Tan, "
    "Liu, Wang, Su, Li, Yao, Han, Ding, Zhao, Wang; ICCV 2023, arXiv 2308.07313)",
    "licence": "Apache-2.0",
    "source": "https://github.com/Michel-liu/GroupPose",
    "preprocessing": {"mean": PIXEL_MEAN, "std": PIXEL_STD, "channels": "RGB", "short": 800, "long": 1333},
    "official": GroupPoseOfficial,
}


@register_model(
    summary="Group Pose, ResNet-50, 49 M: COCO keypoint AP 72.0 (official README)",
    status="official parity",
    **ABOUT,
)
def group_pose_r50(*, backbone: str = "resnet50", **options: Any) -> GroupPose:
    return GroupPose(backbone=backbone, **options)


@register_model(
    summary="Group Pose, Swin-T, 50 M: COCO keypoint AP 73.6 (official README)",
    status="official parity",
    **ABOUT,
)
def group_pose_swin_t(*, backbone: str = "swin_t", **options: Any) -> GroupPose:
    return GroupPose(backbone=backbone, **options)


@register_model(
    summary="Group Pose, Swin-L, 220 M: COCO keypoint AP 74.8, CrowdPose 74.1 (official README)",
    status="official parity",
    **ABOUT,
)
def group_pose_swin_l(*, backbone: str = "swin_l", **options: Any) -> GroupPose:
    return GroupPose(backbone=backbone, **options)


@register_model(
    summary="A small Group Pose, to train from scratch on a CPU: 20 instances, 64 channels",
    status="re-implementation",
    **ABOUT,
)
def group_pose_mini(
    *,
    num_queries: int = 20,
    backbone: str = "resnet_mini",
    backbone_options: dict[str, Any] | None = None,
    backbone_levels: int = 2,
    num_levels: int = 3,
    embed_dim: int = 64,
    num_heads: int = 4,
    enc_layers: int = 1,
    dec_layers: int = 2,
    ffn_dim: int = 128,
    **options: Any,
) -> GroupPose:
    if backbone == "resnet_mini" and backbone_options is None:
        backbone_options = {"norm": "batch", "frozen_stages": 0}
    return GroupPose(
        num_queries=num_queries,
        backbone=backbone,
        backbone_options=backbone_options,
        backbone_levels=backbone_levels,
        num_levels=num_levels,
        embed_dim=embed_dim,
        num_heads=num_heads,
        enc_layers=enc_layers,
        dec_layers=dec_layers,
        ffn_dim=ffn_dim,
        **options,
    )
