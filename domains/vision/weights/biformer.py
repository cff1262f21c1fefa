"""Official BiFormer checkpoints <-> ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from domains.vision.weights.layout import VisionLayout, check_published_attention, counters
from zoo.errors import ConfigError

_ROUTED = {"qkv": "qkv.qkv", "lepe": "lepe", "proj": "wo"}
_ROUTED_NCHW = {"qkv": "qkv_linear", "lepe": "lepe", "proj": "output_linear"}
_FULL = {"qkv": "qkv", "lepe": "lepe", "proj": "proj"}
_CONVOLUTIONS = {"v": "1", "lepe": "2", "proj": "3"}


def _attention_names(attn: nn.Module, nchw: bool) -> dict[str, str]:
    kind = type(attn).__name__
    if kind == "FullAttention":
        return _FULL
    if kind == "ConvolutionInstead":
        return _CONVOLUTIONS
    return _ROUTED_NCHW if nchw else _ROUTED


def _modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of module names, ours and official."""
    patches, nchw = bool(model.patches), model.regions == "floor"
    if patches:
        yield from (("stem.1.conv", "downsample_layers.0.0"), ("stem.1.norm", "downsample_layers.0.1"))
    else:
        for ours, official in (("1.conv", 0), ("1.norm", 1), ("3.conv", 3), ("3.norm", 4)):
            yield f"stem.{ours}", f"downsample_layers.0.{official}"
    for i, stage in enumerate(model.stages):  # type: ignore[arg-type]
        if i:
            conv, norm = (1, 0) if patches else (0, 1)
            yield f"stages.{i}.0.conv", f"downsample_layers.{i}.{conv}"
            yield f"stages.{i}.0.norm", f"downsample_layers.{i}.{norm}"
        first = int(i > 0)
        for b, block in enumerate(list(stage)[first:]):
            ours, official = f"stages.{i}.{b + first}", f"stages.{i}.{'blocks.' * patches}{b}"
            for name in ("norm1", "norm2"):
                yield f"{ours}.{name}", f"{official}.{name}"
            yield f"{ours}.pos", f"{official}.pos_embed"
            for name, theirs in _attention_names(block.attn, nchw).items():
                yield f"{ours}.attn.{name}", f"{official}.attn.{theirs}"
            yield f"{ours}.mlp.0", f"{official}.mlp.0"
            yield f"{ours}.mlp.2", f"{official}.mlp.{2 if patches else 3}"
        yield f"out_norms.{i}", f"extra_norms.{i}"
    yield from (("norm", "norm"), ("head", "head"))


def _names(model: nn.Module) -> dict[str, str]:
    """Our tensor names -> official ones."""
    check_published_attention(model)
    official = dict(_modules(model))
    names = {}
    for name in model.state_dict():
        module, _, kind = name.rpartition(".")
        if kind in ("gamma1", "gamma2"):
            stage, block = module.split(".")[1:3]
            inner = f"blocks.{int(block) - (stage != '0')}" if model.patches else int(block) - (stage != "0")
            names[name] = f"stages.{stage}.{inner}.{kind}"
        elif kind != "num_batches_tracked":
            names[name] = f"{official[module]}.{kind}"
    return names


class BiFormerOfficial(VisionLayout):
    """State dicts of the classifier, and of the dense-prediction backbone with its `extra_norms`."""

    first_conv = "downsample_layers.0.0.weight"
    added = ("extra_norms.*",)

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        num_classes: int | None = None,
        depth: list[int] | None = None,
        embed_dim: list[int] | None = None,
        mlp_ratios: list[float] | None = None,
        n_win: int | None = None,
        topks: list[int] | None = None,
        qk_dims: list[int] | None = None,
        head_dim: int | None = None,
        side_dwconv: int | None = None,
        before_attn_dwconv: int | None = None,
        layer_scale_init_value: float = -1,
        drop_path_rate: float | None = None,
        drop_rate: float | None = None,
        in_chans: int | None = None,
        qk_scale: float | None = None,
        mlp_dwconv: bool = False,
        param_attention: str = "qkvo",
        use_checkpoint_stages: list[int] | None = None,
        kv_downsample_mode: str = "identity",
        kv_per_wins: list[int] | None = None,
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        pre_norm: bool = True,
        pe: str | None = None,
        auto_pad: bool = True,
    ) -> dict[str, Any]:
        """Options that no published model uses are refused. Maps are always padded where that is needed."""
        unused = {
            "kv_downsample_mode": kv_downsample_mode != "identity",
            "kv_per_wins": any(size not in (-1, 0, 1) for size in kv_per_wins or []),
            "param_routing": param_routing,
            "diff_routing": diff_routing,
            "soft_routing": soft_routing,
            "pre_norm": not pre_norm,
            "pe": bool(pe),
            "qk_scale": qk_scale is not None,
            "mlp_dwconv": mlp_dwconv,
            "param_attention": param_attention != "qkvo",
        }
        if any(unused.values()):
            wrong = ", ".join(name for name, used in unused.items() if used)
            raise ConfigError(f"No published BiFormer uses {wrong} this way, and this one cannot.")
        options = {
            "depths": depth,
            "embed_dims": embed_dim,
            "topks": topks,
            "head_dim": head_dim,
            "n_win": n_win,
            "mlp_ratios": mlp_ratios,
            "qk_dims": qk_dims,
            "side_dwconv": side_dwconv,
            "pos_dwconv": before_attn_dwconv,
            "layer_scale": layer_scale_init_value if layer_scale_init_value > 0 else None,
            "drop_path_rate": drop_path_rate,
            "drop_rate": drop_rate,
        }
        return _common(state_dict) | {name: value for name, value in options.items() if value is not None}

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        own = model.state_dict()
        tensors = {
            ours: state_dict[name].flatten(1) if own[ours].ndim == 2 else state_dict[name]
            for ours, name in _names(model).items()
        }
        return tensors | counters(tensors)

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        nchw = model.regions == "floor"
        out = {}
        for ours, name in _names(model).items():
            if ours in state_dict:
                tensor = state_dict[ours]
                convolution = (nchw or ".attn.1" in name or ".attn.3" in name) and tensor.ndim == 2
                out[name] = tensor[:, :, None, None] if convolution and "head" not in name else tensor
        return out | counters(out)


def _common(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes of an official file tell."""
    config: dict[str, Any] = {"in_chans": state_dict[BiFormerOfficial.first_conv].shape[1]}
    if "head.weight" in state_dict:
        return config | {"num_classes": len(state_dict["head.weight"])}
    if any(name.startswith("extra_norms.") for name in state_dict):
        return config | {"features_only": True, "out_norms": True}
    return config | {"num_classes": 0}


class BiFormerSTLOfficial(BiFormerOfficial):
    """State dicts of the two programs in the layout of Swin-T."""

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        num_classes: int | None = None,
        depth: list[int] | None = None,
        embed_dim: list[int] | None = None,
        mlp_ratios: list[float] | None = None,
        n_wins: int | list[int] | None = None,
        topks: list[int] | None = None,
        head_dim: int | None = None,
        side_dwconv: int | None = None,
        drop_path_rate: float | None = None,
        drop_rate: float | None = None,
        in_chans: int | None = None,
        use_checkpoint_stages: list[int] | None = None,
        norm_layer: str | None = None,
    ) -> dict[str, Any]:
        """`norm_layer` is read from the tensors: batch norms have running means."""
        options = {
            "depths": depth,
            "embed_dims": embed_dim,
            "topks": topks,
            "head_dim": head_dim,
            "n_win": n_wins,
            "mlp_ratios": mlp_ratios,
            "side_dwconv": side_dwconv,
            "drop_path_rate": drop_path_rate,
            "drop_rate": drop_rate,
            "channel_norm": "downsample_layers.0.1.running_mean" not in state_dict,
        }
        return _common(state_dict) | {name: value for name, value in options.items() if value is not None}
