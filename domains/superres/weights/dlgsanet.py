"""Official DLGSANet checkpoints <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.weights.formats import PREFIXES
from zoo.weights.official import OfficialLayout

TRUNK = "deep_feature_extraction"
FIRST = "overlap_embed.0.proj.weight"
BLOCK_TYPES = {"sparseedge": "sparse", "edge": "softmax", "idynamic": "local", "restormer": "global"}
"""`buildblock_type` and our names."""
UPSAMPLERS = {"pixelshuffledirect": "direct", "pixelshuffle": "stepwise"}
MLPS = {"GDFN": "gated", "BaseFFN": "plain"}
ACTIVATIONS = ("relu", "gelu", "sigmoid")
"""The official program takes any other name for the identity."""

LOCAL = {
    "norm1": "norm1.body",
    "norm2": "norm2.body",
    "mixer.value": "IDynamicDWConv.conv0",
    "mixer.squeeze": "IDynamicDWConv.conv.conv1.0",
    "mixer.spread": "IDynamicDWConv.conv.conv1.1",
    "mixer.filters": "IDynamicDWConv.conv.conv2.0",
    "mixer.conv": "IDynamicDWConv.conv",
    "mixer.proj": "IDynamicDWConv.conv1",
}
"""Modules of a layer of local attention, ours and the official ones."""
GLOBAL = {
    "norm1": "norm3.body",
    "norm2": "norm4.body",
    "mixer": "restormer_attn",
    "mixer.qkv": "restormer_attn.qkv",
    "mixer.qkv_conv": "restormer_attn.qkv_dwconv",
    "mixer.proj": "restormer_attn.project_out",
}
"""Modules of a layer of attention between channels."""
GATED = {"mlp.fc1": "project_in", "mlp.conv": "dwconv", "mlp.fc2": "project_out"}
PLAIN = {"mlp.fc1": "body.0", "mlp.fc2": "body.2"}


class DLGSANetOfficial(OfficialLayout):
    """State dicts of BasicSR files; `read_state_dict` takes `params_ema` or `params` out of the file."""

    wrapper = "params"

    @staticmethod
    def matches(state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a file is of this architecture."""
        return any(name.endswith(FIRST) for name in state_dict) and any(TRUNK in name for name in state_dict)

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the prefix of wrappers."""
        out = {}
        for name, value in state_dict.items():
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            out[name] = value
        return out

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        in_chans: int | None = None,
        dim: int | None = None,
        groups: int | None = None,
        blocks: int | None = None,
        buildblock_type: str | None = None,
        window_size: int | None = None,
        idynamic_num_heads: int | None = None,
        idynamic_ffn_type: str | None = None,
        idynamic_ffn_expansion_factor: float | None = None,
        idynamic: bool | None = None,
        restormer_num_heads: int | None = None,
        restormer_ffn_type: str | None = None,
        restormer_ffn_expansion_factor: float | None = None,
        tlc_flag: bool = True,
        tlc_kernel: int | None = None,
        activation: str = "relu",
        upscale: int | None = None,
        img_range: float = 1.0,
        upsampler: str | None = None,
        body_norm: bool | None = None,
        input_resolution: Any = None,
    ) -> dict[str, Any]:
        """Everything that shapes tell is read from them. Not in a file, and as published unless given: the
        windows of evaluation, the range, the activation, and which of its two attentions between channels
        (`buildblock_type` sparseedge or edge). `input_resolution` only served to count operations.

        Raises:
            CheckpointError: an option that is not that of the file.
        """
        found = _Found(state_dict)
        for kind in (idynamic_ffn_type, restormer_ffn_type):
            if kind not in (None, *MLPS):
                raise CheckpointError(
                    f"There is no feed-forward {kind!r}. The official ones: {', '.join(MLPS)}."
                )
        given = {
            "in_chans": in_chans,
            "dim": dim,
            "groups": groups,
            "blocks": blocks,
            "kernel_size": window_size,
            "dynamic": idynamic,
            "num_heads": restormer_num_heads,
            "local_mlp": MLPS.get(str(idynamic_ffn_type)),
            "global_mlp": MLPS.get(str(restormer_ffn_type)),
            "upsampler": None if upsampler is None else UPSAMPLERS.get(upsampler, "none"),
            "scale": 1 if found.upsampler == "none" else upscale,
            "body_norm": body_norm,
        }
        read = found.config()
        for name, value in given.items():
            if value is not None and name in read and value != read[name]:
                raise CheckpointError(f"The checkpoint has {name}={read[name]}, not {value}.")
        block_type = found.block_type(buildblock_type)
        ratios = {
            "local_ratio": idynamic_ffn_expansion_factor,
            "global_ratio": restormer_ffn_expansion_factor,
        }
        free = {
            "group_channels": idynamic_num_heads,
            "tlc": tlc_flag,
            "tlc_kernel": tlc_kernel,
            "activation": activation if activation in ACTIVATIONS else "identity",
            "img_range": img_range,
        }
        stated = {name: value for name, value in (given | ratios | free).items() if value is not None}
        return stated | read | {"block_type": block_type} | found.consistent(stated)

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        names = official_names(model)
        return {ours: state_dict[names[ours]].reshape(own.shape) for ours, own in model.state_dict().items()}

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        names = official_names(model)
        return {
            names[ours]: value[:, :, None, None] if value.ndim == 2 else value
            for ours, value in state_dict.items()
        }

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Raises `CheckpointError` for a file of another scale, naming both."""
        if cls.matches(state_dict) and (scale := _Found(state_dict).scale) != model.scale:
            raise CheckpointError(
                f"The checkpoint enlarges {scale} times, the model {model.scale} times. Use "
                f"dlgsanet_..._x{scale}, or `zoo finetune model=dlgsanet_..._x{scale} checkpoint=FILE "
                f"data.scale={model.scale}`, which starts from all but the up-sampler."
            )
        return state_dict


# ---- names -------------------------------------------------------------------------------------------------


def official_names(model: nn.Module) -> dict[str, str]:
    """Our tensor names -> the official ones."""
    offset = int(isinstance(model.norm_in, nn.LayerNorm))
    count = len(model.groups)  # pyright: ignore[reportArgumentType]
    modules = {
        "embed": "overlap_embed.0.proj",
        "norm_in": f"{TRUNK}.0.body",
        "norm_out": f"{TRUNK}.{count + 1}.body",
        "conv": f"{TRUNK}.{count + 2 * offset}",
        "upsampler.before": "conv_before_upsample.0",
        "upsampler.last": "conv_last",
    }
    names = {}
    for ours in model.state_dict():
        module, _, kind = ours.rpartition(".")
        if group := re.fullmatch(r"groups\.(\d+)\.(?:conv|layers\.(\d+)\.(.+))", module):
            official = f"{TRUNK}.{int(group[1]) + offset}.body." + _in_group(model, *group.groups())
        elif step := re.fullmatch(r"upsampler\.convs\.(\d+)", module):
            official = f"upsample.{2 * int(step[1])}"
        else:
            official = modules[module]
        names[ours] = f"{official}.{kind}"
    return names


def _in_group(model: Any, group: str, layer: str | None, part: str | None) -> str:
    layers = model.groups[int(group)].layers
    if layer is None or part is None:
        return str(len(layers))
    chosen = layers[int(layer)]
    if part.startswith("mlp."):
        inside = (GATED if hasattr(chosen.mlp, "conv") else PLAIN)[part]
        return f"{layer}.{'IDynamic_ffn' if chosen.is_local else 'restormer_ffn'}.{inside}"
    return f"{layer}.{(LOCAL if chosen.is_local else GLOBAL)[part]}"


# ---- shapes ------------------------------------------------------------------------------------------------


class _Found:
    """What the shapes of an official state dict tell."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.state = state_dict
        self.dim, self.in_chans = state_dict[FIRST].shape[:2]
        self.body_norm = f"{TRUNK}.0.body.weight" in state_dict
        pattern = re.compile(rf"{TRUNK}\.(\d+)\.body\.(\d+)\.(.+)")
        parts = [match.groups() for name in state_dict if (match := pattern.fullmatch(name))]
        if not parts:
            raise KeyError(f"{TRUNK}.0.body.0.norm1.body.weight")
        self.groups = len({group for group, _, _ in parts})
        inside: dict[str, dict[str, Tensor]] = {}
        for group, layer, name in parts:
            if int(group) == int(self.body_norm):
                inside.setdefault(layer, {})[name] = state_dict[f"{TRUNK}.{group}.body.{layer}.{name}"]
        layers = list(inside.values())
        self.local = next((layer for layer in layers if "norm1.body.weight" in layer), None)
        self.across = next((layer for layer in layers if "norm3.body.weight" in layer), None)
        kinds = (self.local is not None) + (self.across is not None)
        self.blocks = (len(layers) - 1) // max(1, kinds)

    @property
    def upsampler(self) -> str:
        if "conv_before_upsample.0.weight" in self.state:
            return "stepwise"
        return "none" if "conv_last.weight" in self.state else "direct"

    @property
    def scale(self) -> int:
        if self.upsampler == "none":
            return 1
        if self.upsampler == "direct":
            return round((len(self.state["upsample.0.weight"]) / self.in_chans) ** 0.5)
        steps = [value for name, value in self.state.items() if re.fullmatch(r"upsample\.\d+\.weight", name)]
        factors = [round((len(value) / value.shape[1]) ** 0.5) for value in steps]
        return factors[0] ** len(factors) if factors else 1

    def block_type(self, official: str | None) -> str:
        if official is not None and official not in BLOCK_TYPES:
            raise CheckpointError(
                f"There is no buildblock_type {official!r}. The official ones: {', '.join(BLOCK_TYPES)}."
            )
        if self.local is None or self.across is None:
            possible = ["idynamic" if self.across is None else "restormer"]
        else:
            possible = ["sparseedge", "edge"]
        if official not in (None, *possible):
            raise CheckpointError(
                f"The checkpoint has blocks of type {' or '.join(possible)}, not {official}."
            )
        return BLOCK_TYPES[official or possible[0]]

    def config(self) -> dict[str, Any]:
        """Our constructor arguments that have one value."""
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("scale", "dim", "in_chans", "groups", "blocks", "body_norm", "upsampler")
        }
        if self.local is not None:
            dynamic = "IDynamicDWConv.conv.conv1.1.weight" in self.local
            window = self.local[f"IDynamicDWConv.conv.{'conv1.1.' if dynamic else ''}weight"]
            found |= {"dynamic": dynamic, "kernel_size": window.shape[-1]}
            found["local_mlp"], _ = _mlp(self.local, "IDynamic_ffn")
        if self.across is not None:
            found["num_heads"] = len(self.across["restormer_attn.temperature"])
            found["global_mlp"], _ = _mlp(self.across, "restormer_ffn")
        return found

    def consistent(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of which several values give the same shapes: the stated one if it does.

        Raises:
            CheckpointError: it does not.
        """
        found: dict[str, Any] = {}
        for layer, ffn, name in (
            (self.local, "IDynamic_ffn", "local_ratio"),
            (self.across, "restormer_ffn", "global_ratio"),
        ):
            if layer is not None:
                _, hidden = _mlp(layer, ffn)
                found[name] = stated.get(name, _ratio(hidden, self.dim))
                if int(self.dim * found[name]) != hidden:
                    raise CheckpointError(
                        f"The checkpoint has {ffn} of {hidden} channels, not {found[name]}x."
                    )
        filters = (self.local or {}).get("IDynamicDWConv.conv.conv2.0.weight")
        if self.local is not None and filters is not None:
            window = self.local["IDynamicDWConv.conv.conv1.1.weight"].shape[-1]
            groups = len(filters) // window**2
            width = found["group_channels"] = stated.get("group_channels", self.dim // groups)
            if self.dim // width != groups:
                raise CheckpointError(
                    f"The checkpoint has {groups} groups of filters, not of {width} channels."
                )
        return found


def _mlp(layer: Mapping[str, Tensor], name: str) -> tuple[str, int]:
    """Which MLP a layer has, and its hidden width."""
    gated = f"{name}.project_out.weight"
    if gated in layer:
        return "gated", layer[gated].shape[1]
    return "plain", layer[f"{name}.body.2.weight"].shape[1]


def _ratio(hidden: int, dim: int) -> float:
    """A factor that gives `hidden` channels by `int(dim * factor)`."""
    exact = hidden / dim
    return exact if int(dim * exact) == hidden else (hidden + 0.5) / dim
