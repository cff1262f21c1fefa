"""From pictures to tensors: the preprocessing that weights ask for, and augmentation in timm's words.

A picture is what `domains.vision.images.read_image` gives; a tensor is `(C, H, W)` float32, normalised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from timm.data.config import resolve_model_data_config
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from domains.vision.images import Picture
from zoo.errors import ConfigError, did_you_mean

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), as in PIL."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the input of a model; stored in checkpoints.

    Attributes:
        size: height and width.
        channels: bands of the input; 1 is the grey of RGB.
        interpolation: PIL's name of the filter.
        crop_pct: the share of the resized image that the crop keeps.
        crop_mode: `center`: the shorter side is resized and the middle cropped; `squash`: both sides are
            resized; `border`: the longer side is, and the rest filled.
        mean, std: of each channel of images scaled to [0, 1].
        max_value: see `read_image`.
    """

    size: tuple[int, int]
    channels: int
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_value: float | None = None

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.size) != 2 or min(self.size) < 1:
            raise ConfigError(f"data.size={list(self.size)}: write a number of pixels or [height, width].")
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise ConfigError(
                f"data.mean and data.std have one number for each of {self.channels} channels (std above 0), "
                f"not {list(self.mean)} and {list(self.std)}."
            )
        for key, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("crop_mode", self.crop_mode, CROP_MODES),
        ):
            if value not in known:
                raise ConfigError(f"data.{key}={value} is not one of {', '.join(known)}.")
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"data.crop_pct={self.crop_pct}: a share above 0, at most 1.")

    @classmethod
    def of(cls, model: nn.Module, *, channels: int | None = None, **given: Any) -> Self:
        """As the model's `pretrained_cfg` says, save what is given and not None.

        For other than three channels its means and deviations are averaged.
        """
        known = resolve_model_data_config(model)
        bands: int = getattr(model, "in_chans", 3) if channels is None else channels
        own = {
            "size": known["input_size"][1:],
            "interpolation": known["interpolation"],
            "crop_pct": known["crop_pct"],
            "crop_mode": known["crop_mode"],
            "mean": _for_channels(known["mean"], bands),
            "std": _for_channels(known["std"], bands),
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(channels=bands, **(own | chosen))

    def evaluation(self) -> Callable[[Picture], Tensor]:
        """Resize, crop, normalise."""
        transform = create_transform(
            self.size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            **self._normalisation,
        )
        return Transform(transform, self.channels)

    def training(self, augment: Augment) -> Callable[[Picture], Tensor]:
        """Random crops and what else `augment` says, then normalise."""
        if augment.no_aug:
            return self.evaluation()
        if self.channels not in (1, 3) and augment.aa:
            raise ConfigError(
                f"data.augment.aa={augment.aa} works on RGB, not on {self.channels} bands: set it to null."
            )
        try:
            transform = create_transform(
                self.size,
                is_training=True,
                scale=augment.scale,
                ratio=augment.ratio,
                hflip=augment.hflip,
                vflip=augment.vflip,
                color_jitter=augment.color_jitter if self.channels in (1, 3) else None,  # pyright: ignore
                auto_augment=augment.aa,
                interpolation=augment.train_interpolation or self.interpolation,
                re_prob=augment.reprob,
                re_mode=augment.remode,
                re_count=augment.recount,
                **self._normalisation,
            )
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ConfigError(f"timm cannot make the augmentation of data.augment: {reason}") from None
        return Transform(transform, self.channels)

    @property
    def _normalisation(self) -> dict[str, Any]:
        """Of the picture; that of one channel serves all of RGB."""
        three = 3 if self.channels == 1 else 1
        return {"mean": self.mean * three, "std": self.std * three}


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if channels == len(values) else (float(np.mean(values)),) * channels


class Transform:
    """A transform of timm on pictures of any channels; for one channel, the grey of its result."""

    def __init__(self, transform: Any, channels: int) -> None:
        self.transform, self.channels = transform, channels

    def __call__(self, picture: Picture) -> Tensor:
        if isinstance(picture, np.ndarray):
            picture = torch.from_numpy(picture).permute(2, 0, 1)  # pyright: ignore[reportAssignmentType]
        tensor = self.transform(picture)
        if self.channels == 1:
            return (tensor * torch.tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
        return tensor


@dataclass(frozen=True)
class Augment:
    """How training images are changed, in the words of timm's training script.

    Attributes:
        no_aug: train on images as they are evaluated; `mixup` and `cutmix` stay.
        scale, ratio: range of the random crop's area (of 1) and of its width over height.
        hflip, vflip: probability of flips.
        color_jitter: strength; left out where `aa` is given, and on other than 1 and 3 channels.
        aa: RandAugment or AutoAugment, e.g. `rand-m9-mstd0.5-inc1`.
        train_interpolation: filter of the random crop, `random` for a choice of two; None: as in evaluation.
        reprob, remode, recount: random erasing: probability, `const`, `rand` or `pixel`, most rectangles.
        mixup, cutmix: alpha; 0 is off.
        mixup_prob, mixup_switch_prob, mixup_mode: probability of mixing, of CutMix where both are on, and
            `batch`, `pair` or `elem`.
        aug_repeats: copies of each image in a batch (Hoffer et al. 2020); an epoch then has fewer images.
    """

    no_aug: bool = False
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | tuple[float, ...] | None = None
    aa: str | None = None
    train_interpolation: str | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    aug_repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.augment.{name}={getattr(self, name)}: a probability from 0 to 1.")
        for name, known in (
            ("mixup_mode", ("batch", "pair", "elem")),
            ("remode", ("const", "rand", "pixel")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"data.augment.{name}={getattr(self, name)} is not one of {', '.join(known)}."
                )
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"data.augment.{name}=[{low}, {high}]: write [lowest, highest], above 0.")
        if min(self.mixup, self.cutmix) < 0 or self.aug_repeats < 1:
            raise ConfigError("data.augment: mixup and cutmix are at least 0, aug_repeats at least 1.")

    @classmethod
    def from_config(cls, options: Mapping[str, Any] | None) -> Self:
        """Raises `ConfigError` for a name that there is not."""
        known = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in known:
                raise ConfigError(f"Unknown key data.augment.{name}.{did_you_mean(str(name), known)}")
        chosen: dict[str, Any] = {
            name: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            for name, value in (options or {}).items()
        }
        return cls(**chosen)

    def mixer(self, num_classes: int, smoothing: float) -> Mixup | None:
        """What mixes the images of a batch and their labels; None where nothing is mixed."""
        if not (self.mixup or self.cutmix):
            return None
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            mode=self.mixup_mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )


PREPROCESSING_OPTIONS = tuple(
    name for name in inspect.signature(Preprocessing).parameters if name != "channels"
)
"""What of the preprocessing a user may give: `data.NAME`."""
