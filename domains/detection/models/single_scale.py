"""What the detectors on one map have in common: backbone, encoder, and which queries of the groups run.

Shapes: B images, S = H W tokens of the map, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from domains.detection.models.backbones import create_backbone
from domains.detection.models.common import LearnedPosition, check_images, full, resized_mask, sine_position
from domains.detection.models.conditional import Attention, EncoderLayer, reset_transformer
from domains.detection.models.detector import GroupDetector, Outputs, check_width
from zoo.attention import Padding, Pattern
from zoo.errors import ConfigError


class SingleScaleDetector(GroupDetector):
    """The backbone's last map through an encoder; a subclass has the queries, the decoder and the heads.

    Args:
        num_classes: C; the published models have the largest COCO category id and one.
        num_queries: N, of a group.
        groups: G, in training.
        backbone: a name that `create_backbone` knows.
        dilation: of a ResNet with bottlenecks: the last stage keeps stride 16 (DC5).
        backbone_options: further arguments of the backbone.
        embed_dim: d.
        num_heads: divides d.
        enc_layers, dec_layers: number of layers.
        ffn_dim: hidden width of the FFNs.
        dropout: of attention weights, branches and FFNs.
        position: of the map's cells: `sine`, as published, or `learned`.
        attention: another layer of the zoo in the encoder, by name or by mapping, that looks both ways and
            takes padded rows; no published weights have it.

    Raises:
        ConfigError: sizes that do not fit together, or an unknown backbone.
        UnknownName: no layer of that name.
        AttentionError: an argument that the layer does not have, or a layer that cannot stand there.
    """

    temperature: ClassVar[float] = 10000.0
    """Of sine encodings."""

    def __init__(
        self,
        num_classes: int = 91,
        *,
        num_queries: int = 300,
        groups: int = 11,
        backbone: str = "resnet50",
        dilation: bool = False,
        backbone_options: dict[str, Any] | None = None,
        embed_dim: int = 256,
        num_heads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        position: str = "sine",
        attention: Attention | None = None,
    ) -> None:
        super().__init__(num_classes, num_queries, groups)
        check_width(embed_dim, num_heads)
        if dec_layers < 1:
            raise ConfigError(f"dec_layers is at least 1, not {dec_layers}.")
        if position not in ("sine", "learned"):
            raise ConfigError(f"The position of cells is sine or learned, not {position!r}.")
        options = dict(backbone_options or {}) | ({"dilation": True} if dilation else {})
        self.backbone = create_backbone(backbone, 1, **options)
        (channels,) = self.backbone.channels  # pyright: ignore[reportGeneralTypeIssues]
        self.input_proj = nn.Conv2d(channels, embed_dim, 1)  # pyright: ignore[reportArgumentType]
        self.position = LearnedPosition(embed_dim) if position == "learned" else None
        self.encoder = nn.ModuleList(
            EncoderLayer(embed_dim, num_heads, ffn_dim, dropout, self.activation(), attention)
            for _ in range(enc_layers)
        )
        for layer in self.encoder:
            reset_transformer(layer.ffn)  # pyright: ignore[reportArgumentType]
        self.make_decoder(embed_dim, num_heads, ffn_dim, dec_layers, dropout)

    def activation(self) -> nn.Module | None:
        """Of one FFN; None = ReLU."""
        return None

    def make_decoder(
        self, embed_dim: int, num_heads: int, ffn_dim: int, num_layers: int, dropout: float
    ) -> None:
        """Queries, decoder layers and heads."""
        raise NotImplementedError

    def decode(self, memory: Tensor, pos: Tensor, pattern: Pattern | None, auxiliary: bool) -> Outputs:
        """Memory `(B, S, d)` with positions `(B or 1, S, d)` to predictions."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, mask: Tensor | None = None, *, auxiliary: bool | None = None
    ) -> Outputs:
        """Images `(B, 3, H, W)`, normalised, with mask `(B, H, W)`, True = padding, to predictions.

        Args:
            auxiliary: also predict from the layers before the last; by default in training only.

        Raises:
            DataError: images or a mask of another shape.
        """
        check_images(images, mask)
        (features,) = self.backbone(images)
        return self.detect(features, mask, auxiliary=auxiliary)

    def detect(
        self, features: Tensor, mask: Tensor | None = None, *, auxiliary: bool | None = None
    ) -> Outputs:
        """From the backbone's last map `(B, C, H, W)`; the mask is that of the images."""
        size = features.shape[-2:]
        if mask is not None:
            mask = resized_mask(mask, size)
        pattern = None if mask is None else Padding(~mask.flatten(1))
        x = self.input_proj(features).flatten(2).transpose(1, 2)
        pos = self._position(size, mask, x).flatten(1, 2).to(full(x).dtype)
        for layer in self.encoder:
            x = self.run(layer, x, pos, pattern, size)
        auxiliary = self.training if auxiliary is None else auxiliary
        return self.decode(x, pos, pattern, auxiliary)

    def _position(self, size: Sequence[int], mask: Tensor | None, x: Tensor) -> Tensor:
        """`(B or 1, H, W, d)`"""
        if self.position is not None:
            return self.position(size)
        return sine_position(size, mask, x.shape[-1], temperature=self.temperature, device=x.device)
