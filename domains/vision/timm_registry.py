"""The vision models in timm's own registry.

After `import domains.vision`, `timm.create_model("zoo_biformer_tiny")` and, where timm has no model of that
name, `timm.create_model("biformer_tiny")` build them, with `features_only`, `pretrained_cfg_overlay={"file":
...}` (own or official weights) and all else that timm's scripts pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import nn

from domains.vision.backbone import Backbone
from zoo.create import create_model
from zoo.errors import CheckpointError
from zoo.registry import list_models, model_card, model_class
from zoo.weights.cards import weight_card
from zoo.weights.download import fetch
from zoo.weights.exchange import load_weights

default_cfgs: dict[str, Any] = {}
"""Where timm's `register_model` looks for the preprocessing of each model."""


def register() -> None:
    """Enter every vision model of the zoo under `zoo_NAME`, and under NAME where timm has none."""
    for name in list_models("vision/*"):
        names = [f"zoo_{name}"] if timm.is_model(name) else [f"zoo_{name}", name]
        for alias in names:
            default_cfgs.update(generate_default_cfgs(_cfgs(name, alias)))
            register_model(_entrypoint(name, alias))


def _cfgs(name: str, alias: str) -> dict[str, Any]:
    """`pretrained_cfg` for each published checkpoint; the card `NAME_TAG` gives the tag."""
    model = model_class(name)
    assert isinstance(model, type)
    assert issubclass(model, Backbone)
    cfg = model.published_cfg()
    cards = [weight_card(weights) for weights in model_card(name, count=False).weights]
    return {
        f"{alias}.{card.name.removeprefix(f'{name}_')}": cfg | {"url": card.address} for card in cards
    } or {alias: cfg}


def _entrypoint(name: str, alias: str) -> Callable[..., nn.Module]:
    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        cfg = resolve_pretrained_cfg(alias, pretrained_cfg, pretrained_cfg_overlay)
        build = partial(_build, name, cfg if pretrained else None)
        # Weights are loaded by the zoo, which knows official layouts and says what does not fit.
        return build_model_with_cfg(
            build,
            alias,
            pretrained=False,
            pretrained_cfg=cfg.to_dict(),
            feature_cfg={"feature_cls": "getter", "out_indices": None},
            **kwargs,
        )

    entrypoint.__name__ = alias
    entrypoint.__doc__ = model_card(name, count=False).summary
    return entrypoint


def _build(name: str, cfg: PretrainedCfg | None, **kwargs: Any) -> nn.Module:
    """The model, with the weights that `cfg` names."""
    model = create_model(f"vision/{name}", **kwargs)
    if cfg is not None:
        load_weights(model, _source(name, cfg))
    return model


def _source(name: str, cfg: PretrainedCfg) -> Any:
    if cfg.state_dict or cfg.file:
        return cfg.state_dict or cfg.file
    if cfg.tag:
        return fetch(weight_card(f"{name}_{cfg.tag}"))
    raise CheckpointError(
        f"No weights of {name!r} are published at an address. Load a file, own or official: "
        "pretrained=True, pretrained_cfg_overlay={'file': PATH}."
    )
