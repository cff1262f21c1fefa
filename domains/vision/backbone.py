"""What every vision backbone can be asked: timm's contract, written once for all families."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import ConfigError, DataError
from zoo.layers.pool import POOLS, AttentivePool, create_pool
from zoo.weights.exchange import in_own_names

IMAGENET: dict[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "fixed_input_size": False,
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}
"""Preprocessing of the published weights, in timm's words."""


class Backbone(nn.Module):
    """Images to logits: stem, stages, norm, mean over the map, head.

    A subclass sets `first_conv` and, in its constructor, calls `super().__init__(**options)`, makes `stem`,
    `stages` (an `nn.Sequential` of one `nn.Sequential` of blocks per feature level, down-samplers included)
    and, if it has one, `norm`, and calls `finish`. Everything between is its own affair, the layout included;
    maps handed from stage to stage are `(B, C, H, W)`.

    Args:
        num_classes: outputs of the head; 0 = no head, the pooled features are the output.
        in_chans: channels of the images.
        global_pool: `avg`, `max`, or with weights of their own `ggem` (group generalised mean) and
            `attentive` (learned queries, in the place of a pre-head); a mapping gives the arguments, such as
            `{"name": "attentive", "num_queries": 16}`. Empty: with num_classes=0, the map itself is the
            output.
        head_norm: a batch norm without weights of its own before the classifier, as probes have it.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        img_size: the size, or height and width, that the model is meant for; others work as well.
        features_only: the output is the list of maps after the stages named by out_indices, and there is no
            head.
        out_indices: stages, counted from 0, or the last so many; all by default.
    """

    first_conv: ClassVar[str | tuple[str, ...]]
    """Names of the convolutions that see the image."""
    classifier: ClassVar[str | tuple[str, ...]] = "head"
    """Names of the linear layers that make logits."""
    cfg: ClassVar[dict[str, Any]] = {}
    """Where the published weights differ from `IMAGENET`: licence, crop_pct, ..."""
    simple_pools: ClassVar[tuple[str, ...]] = ("avg", "max", "")
    """Pools without weights."""
    min_size: int
    """The shortest side of an image; by default the stride of the last stage."""

    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    pool: nn.Module
    pre_head: nn.Module
    head_norm: nn.Module
    head: nn.Module
    out_norms: nn.ModuleList | None
    feature_info: list[dict[str, Any]] | FeatureInfo

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | Mapping[str, Any] = "avg",
        head_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | Sequence[int] = 224,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if in_chans < 1:
            raise ConfigError(f"in_chans is at least 1, not {in_chans}.")
        if out_indices is not None and not features_only:
            raise ConfigError("out_indices chooses maps of features_only=True.")
        self.num_classes = 0 if features_only else num_classes
        self.in_chans = in_chans
        self.pool_options = self._pool_options("" if features_only else global_pool)
        self.has_head_norm = head_norm
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.features_only, self._asked_indices = features_only, out_indices
        self.grad_checkpointing = False
        self._looked_at_range = False
        self.norm = nn.Identity()
        self.out_norms = None
        self.pretrained_cfg = self.published_cfg()
        self._set_size(img_size)

    @classmethod
    def published_cfg(cls) -> dict[str, Any]:
        """timm's `pretrained_cfg` of the published weights."""
        return copy.deepcopy(
            IMAGENET | cls.cfg | {"first_conv": cls.first_conv, "classifier": cls.classifier}
        )

    def finish(self, dims: Sequence[int], strides: Sequence[int]) -> None:
        """Makes the head, once stem and stages are there: channels and strides of the maps after each stage.

        With features_only, what the maps of out_indices do not need is dropped.
        """
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"stages.{i}"}
            for i, (width, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self.num_features = dims[-1]
        self.min_size = getattr(self, "min_size", strides[-1])
        height, width = self.pretrained_cfg["input_size"][1:]
        self.pretrained_cfg["pool_size"] = (-(-height // strides[-1]), -(-width // strides[-1]))
        if not self.features_only:
            self.pool = self.pre_head = self.head_norm = self.head = nn.Identity()
            self.reset_classifier(self.num_classes, self.pool_options)
            return
        kept = self.prune_intermediate_layers(self._asked_indices, prune_norm=True)
        self.feature_info = FeatureInfo(self.feature_info, tuple(kept))
        self.out_indices = kept

    def drop_path_rates(self, depths: Sequence[int]) -> list[list[float]]:
        """Of each block of each stage, rising linearly to `drop_path_rate`."""
        rates = torch.linspace(0, self.drop_path_rate, sum(depths), device="cpu")
        return [part.tolist() for part in rates.split(list(depths))]

    # ---- the head: a subclass may have its own ----

    def make_pre_head(self) -> nn.Module:
        """What acts on the pooled features `(B, num_features)` before the classifier, dropped with it.

        Another width than num_features is told by its attribute `out_features`.
        """
        return nn.Identity()

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        """The classifier `(B, in_features) -> (B, num_classes)`."""
        head = nn.Linear(in_features, num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    @property
    def global_pool(self) -> str:
        """Name of the pool; empty: none."""
        return self.pool_options["name"]

    @property
    def head_hidden_size(self) -> int:
        """Width of `forward_head(x, pre_logits=True)`."""
        pooled = getattr(self.pool, "out_features", self.num_features)
        return getattr(self.pre_head, "out_features", pooled)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | Mapping[str, Any] | None = None,
        head_norm: bool | None = None,
    ) -> None:
        """A new head for so many classes, on the device of the old one; 0 = none.

        Args:
            global_pool: a new pool, see the class; None = the one there is, with its weights.
            head_norm: batch norm before the classifier, fresh; None = as it was.
        """
        options = self.pool_options if global_pool is None else self._pool_options(global_pool)
        if num_classes < 0 or (num_classes and not options["name"]):
            raise ConfigError(
                f"num_classes={num_classes} with global_pool={options['name']!r}: a head needs at least one "
                "class and a pool; num_classes=0 with global_pool='' gives the map."
            )
        like = next(self.parameters())
        if global_pool is not None:
            weightless = options["name"] in self.simple_pools
            self.pool = nn.Identity() if weightless else create_pool(options, self.num_features)
            self.pool.to(like.device, like.dtype)
        self.num_classes, self.pool_options = num_classes, options
        self.has_head_norm = self.has_head_norm if head_norm is None else head_norm
        if not num_classes or isinstance(self.pool, AttentivePool):
            self.pre_head = nn.Identity()
        elif isinstance(self.pre_head, nn.Identity):
            self.pre_head = self.make_pre_head().to(like.device, like.dtype)
        self.head_norm = self.head = nn.Identity()
        if num_classes:
            width = self.head_hidden_size
            if self.has_head_norm:
                norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
                self.head_norm = norm.to(like.device, like.dtype)
            self.head = self.make_head(width, num_classes).to(like.device, like.dtype)

    def _pool_options(self, pool: str | Mapping[str, Any]) -> dict[str, Any]:
        """The name and the arguments of a pool that there is."""
        options = {"name": pool} if isinstance(pool, str) else dict(pool)
        simple = options.get("name") in self.simple_pools
        if (not simple and options.get("name") not in POOLS) or (simple and len(options) > 1):
            names = ", ".join(repr(name) for name in self.simple_pools[:-1])
            raise ConfigError(
                f"global_pool is {names} or '', 'ggem' or 'attentive', or one of the last two with its "
                f"arguments, not {pool!r}."
            )
        return options

    # ---- forward ----

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images `(B, in_chans, H, W)` to logits `(B, num_classes)`, or with features_only to a list of
        maps."""
        if self.features_only:
            return self.forward_intermediates(x, self.out_indices, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map of the last stage, `(B, num_features, h, w)`."""
        self.check(x)
        x = self.stem(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits; pre_logits: to what the classifier sees."""
        if not self.global_pool:
            return x
        x = self.head_norm(self.pre_head(self.pooled(x)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The map of `forward_features` to one vector for each image."""
        if self.global_pool in self.simple_pools:
            return x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3))
        return self.pool(x.flatten(2).mT)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps after some stages, and, unless intermediates_only, what `forward_features` gives before
        them.

        Args:
            indices: stages, counted from 0, or the last so many; all by default.
            norm: the map of the last stage as the head sees it. A model with norms for each map (`out_norms`)
                always applies them.
            stop_early: do not run the stages after the last one asked for.

        Raises:
            ConfigError: another output_fmt than NCHW.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"Maps are NCHW, not {output_fmt!r}.")
        self.check(x)
        chosen, last = feature_take_indices(len(self.stages), _indices(indices))
        stages = list(self.stages)[: last + 1] if stop_early or intermediates_only else list(self.stages)
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = self._run(stage, x)
            if i in chosen:
                maps.append(self._out(i, x, norm))
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    def _out(self, i: int, x: Tensor, norm: bool) -> Tensor:
        if self.out_norms is not None:
            return self.out_norms[i](x)
        return self.norm(x) if norm and i == len(self.feature_info) - 1 else x

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return x

    def check(self, x: Tensor) -> None:
        """Raises `DataError` where images are not `(B, in_chans, H, W)`, float, and large enough."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise DataError(
                f"Images are (B, {self.in_chans}, H, W), not {tuple(x.shape)}; for other channels build the "
                "model with in_chans=..."
            )
        if not x.is_floating_point():
            raise DataError(
                f"Images are floating point, scaled to [0, 1] and normalised (timm.data.create_transform), "
                f"not {x.dtype}."
            )
        if min(x.shape[2:]) < self.min_size:
            raise DataError(
                f"Images of {x.shape[2]} x {x.shape[3]} are too small: each side needs at least "
                f"{self.min_size} pixels."
            )
        if self._looked_at_range or torch.compiler.is_compiling():
            return
        self._looked_at_range = True
        if x.device.type == "cpu" and float(x.detach().amax()) > 20:
            warnings.warn(
                "These images hold values above 20: they seem not to be scaled to [0, 1] and normalised.",
                stacklevel=3,
            )

    # ---- changes after construction ----

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of these stages do not need; returns the stages counted from 0."""
        chosen, last = feature_take_indices(len(self.stages), _indices(indices))
        cut = last < len(self.stages) - 1
        if cut or prune_norm:
            self.norm = nn.Identity()
        self.stages = nn.Sequential(*list(self.stages)[: last + 1])
        self.num_features = self.feature_info[last]["num_chs"]
        if self.out_norms is not None:
            norms = enumerate(list(self.out_norms)[: last + 1])
            self.out_norms = nn.ModuleList(norm if i in chosen else nn.Identity() for i, norm in norms)
        if cut or prune_head:
            self.reset_classifier(0, "")
        return chosen

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """The size that images will have from now on: preprocessing follows it."""
        self._set_size(img_size)

    def _set_size(self, img_size: int | Sequence[int]) -> None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) != 2 or min(size) < 1:
            raise ConfigError(f"img_size is a number of pixels or (height, width), not {img_size}.")
        self.pretrained_cfg["input_size"] = (3, *size)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of `nn.Module`; a state dict in the official layout of the model is taken as well."""
        return super().load_state_dict(in_own_names(self, state_dict), strict, assign)

    def fuse(self) -> Self:
        """A copy for inference with equal outputs: every module that has a method `fuse_` has run it.

        It runs after those of the modules inside, rewrites the module in eval mode, and is not undone.
        """
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        fused.__dict__.pop("zoo_config", None)  # its weights are no longer those of the named model
        for module in reversed(list(fused.modules())):
            if hasattr(module, "fuse_"):
                module.fuse_()  # pyright: ignore[reportCallIssue]
        return fused

    # ---- what trainers ask ----

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, cfg: dict[str, Any]) -> None:
        self.pretrained_cfg = cfg

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that decay should leave alone, besides biases and norms."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names in the order of depth, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        blocks = [(r"^stages\.(\d+)\.(\d+)", None), (r"^(?:norm|out_norms)", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}


def _indices(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return list(indices) if isinstance(indices, Sequence) else indices
