"""Chronos-2 in the layout of its official program: folders with `config.json` and `model.safetensors`, and
LoRA adapters for them. Tensor names are those of the official program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError
from zoo.files import atomic_write
from zoo.weights.checkpoint import save_tensors, summarise
from zoo.weights.formats import read_tensors
from zoo.weights.official import OfficialLayout

if TYPE_CHECKING:
    from domains.forecasting.models.chronos2 import Chronos2

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

ADAPTER_PREFIX = "base_model.model."
"""What the official adapters put before the name of a module."""
TARGETS = (
    "self_attention.q",
    "self_attention.k",
    "self_attention.v",
    "self_attention.o",
    "output_patch_embedding.output_layer",
)
"""Linear layers that an adapter of the official fine-tuning changes: of both attentions, and of the head."""

_PLAIN = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "peft_type": "LORA",
}
"""Options of an adapter that merging takes for granted."""


class Chronos2Official(OfficialLayout):
    """The published checkpoints: one name space, so that only the options are translated."""

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        chronos_config: Mapping[str, Any],
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_heads: int = 8,
        dropout_rate: float = 0.1,
        layer_norm_epsilon: float = 1e-6,
        initializer_factor: float = 0.05,
        feed_forward_proj: str = "relu",
        dense_act_fn: str | None = None,
        is_gated_act: bool = False,
        rope_theta: float = 10_000.0,
        **_bookkeeping: Any,
    ) -> dict[str, Any]:
        """The entries of `config.json`; what its library notes beside them has no effect.

        `vocab_size` and the token ids are ignored as well: the official program overwrites them.
        """
        gated = is_gated_act or feed_forward_proj.startswith("gated")
        if gated:
            raise ConfigError(
                "Chronos-2 has no gated activations: feed_forward_proj must not be 'gated-...'."
            )
        return {
            "d_model": d_model,
            "d_kv": d_kv,
            "d_ff": d_ff,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "dropout_rate": dropout_rate,
            "layer_norm_epsilon": layer_norm_epsilon,
            "initializer_factor": initializer_factor,
            "activation": dense_act_fn or feed_forward_proj,
            "rope_theta": rope_theta,
            **_forecasting_options(chronos_config),
        }

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return state_dict

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return state_dict

    @staticmethod
    def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return read_folder(path)


def _forecasting_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `chronos_config` part under our names."""
    needed = ("context_length", "output_patch_size", "input_patch_size", "input_patch_stride", "quantiles")
    absent = [name for name in needed if name not in given]
    if absent:
        raise ConfigError(f"chronos_config has no {', '.join(absent)}.")
    if given["input_patch_size"] != given["output_patch_size"]:
        sizes = given["input_patch_size"], given["output_patch_size"]
        raise ConfigError(f"input_patch_size and output_patch_size must be equal, not {sizes}.")
    known = {*needed, "max_output_patches", "time_encoding_scale", "use_arcsinh", "use_reg_token"}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"chronos_config has entries that Chronos-2 does not know: {', '.join(unknown)}.")
    return {
        "context_length": given["context_length"],
        "patch_size": given["input_patch_size"],
        "patch_stride": given["input_patch_stride"],
        "max_output_patches": given.get("max_output_patches", 1),
        "quantiles": list(given["quantiles"]),
        "time_encoding_scale": given.get("time_encoding_scale"),
        "use_arcsinh": given.get("use_arcsinh", False),
        "use_reg_token": given.get("use_reg_token", False),
    }


# ---- folders -----------------------------------------------------------------------------------------------


def load_folder(path: str | Path, *, base: str | Path | None = None) -> Chronos2:
    """A Chronos-2 from a folder of the official program, in eval mode.

    Args:
        path: holds `config.json` and `model.safetensors`, or a LoRA adapter, which is merged into its base.
        base: folder of the model that an adapter changes; by default the one its config names.

    Raises:
        CheckpointError: files missing or damaged, tensors missing, left over or of another shape.
        ConfigError: options that Chronos-2 does not have.
    """
    from zoo.weights.exchange import from_official

    state, options = read_folder(path, base=base)
    model: Any = from_official("forecasting/chronos2", state, **options)
    return model


def read_folder(
    path: str | Path, *, base: str | Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and `config.json` of a folder of the official program, an adapter merged into its base."""
    path = Path(path)
    if (path / ADAPTER_CONFIG).is_file():
        return _read_adapted(path, base)
    if base is not None:
        raise CheckpointError(f"{path} is no adapter (it has no {ADAPTER_CONFIG}), so base=... has no use.")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path} has no {name}; a folder of the official program has {CONFIG} and {WEIGHTS}."
            )
    options = _read_json(path / CONFIG)
    if not isinstance(options.get("chronos_config"), dict):
        raise CheckpointError(f"{path / CONFIG} has no chronos_config: it is not a Chronos-2.")
    return read_tensors(path / WEIGHTS)[0], options


def save_folder(model: Chronos2, path: str | Path) -> None:
    """Write a model as the official program does, so that it can load it.

    Raises:
        CheckpointError: adapters that are not merged.
    """
    state = model.state_dict()
    if any("lora_" in name for name in state):
        raise CheckpointError("The model has LoRA adapters: merge them, or write them with save_adapter.")
    if model.unseen != "uniform":
        raise CheckpointError(f"The official program has no unseen={model.unseen!r}.")
    if model.attention is not None:
        raise CheckpointError(f"The official program has no attention={model.attention!r}.")
    path = Path(path)
    save_tensors(state, path / WEIGHTS, {"format": "pt"})
    _write_json(path / CONFIG, official_config(model))


def official_config(model: Chronos2) -> dict[str, Any]:
    """The `config.json` of a model."""
    options = model.options
    return {
        "architectures": ["Chronos2Model"],
        "chronos_config": {
            "context_length": options["context_length"],
            "input_patch_size": options["patch_size"],
            "input_patch_stride": options["patch_stride"],
            "max_output_patches": options["max_output_patches"],
            "output_patch_size": options["patch_size"],
            "quantiles": options["quantiles"],
            "time_encoding_scale": options["time_encoding_scale"],
            "use_arcsinh": options["use_arcsinh"],
            "use_reg_token": options["use_reg_token"],
        },
        "chronos_pipeline_class": "Chronos2Pipeline",
        "d_ff": options["d_ff"],
        "d_kv": options["d_kv"],
        "d_model": options["d_model"],
        "dense_act_fn": options["activation"],
        "dropout_rate": options["dropout_rate"],
        "feed_forward_proj": options["activation"],
        "initializer_factor": options["initializer_factor"],
        "is_gated_act": False,
        "layer_norm_epsilon": options["layer_norm_epsilon"],
        "model_type": "t5",
        "num_heads": options["num_heads"],
        "num_layers": options["num_layers"],
        "pad_token_id": 0,
        **({"reg_token_id": 1} if options["use_reg_token"] else {}),
        "rope_theta": options["rope_theta"],
        "torch_dtype": str(model.shared.weight.dtype).removeprefix("torch."),
        "vocab_size": len(model.shared.weight),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no JSON file: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a table of options.")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---- adapters ----------------------------------------------------------------------------------------------


def _read_adapted(path: Path, base: str | Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = _read_json(path / ADAPTER_CONFIG)
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{path} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}.")
    absent = [name for name in ("r", "lora_alpha") if name not in config]
    if absent:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} has no {' and no '.join(absent)}.")
    state, options = read_folder(_base_folder(path, config) if base is None else base)
    return merged(state, read_tensors(path / ADAPTER_WEIGHTS)[0], config, source=str(path)), options


def _base_folder(path: Path, config: Mapping[str, Any]) -> Path:
    """The model that an adapter names, by a folder as it is or from the adapter on."""
    named = config.get("base_model_name_or_path") or "a model that it does not name"
    for folder in (Path(named), path / named):
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"The adapter {path} is for {named}, which is no folder here: say where that lies with base=DIR."
    )


def merged(
    state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: Mapping[str, Any], *, source: str
) -> dict[str, Tensor]:
    """The state dict with the low-rank updates added: `W + (alpha / r) B A` (Hu et al. 2022).

    Args:
        adapter: `base_model.model.MODULE.lora_A.weight` `(r, in)` and `lora_B` `(out, r)`.
        config: the `adapter_config.json`.
        source: what to call the adapter in an error.

    Raises:
        CheckpointError: kinds of adapter that are no plain LoRA, or tensors that do not belong to the model.
    """
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, [] if plain is None else plain):
            raise CheckpointError(
                f"{source} has {name}={config[name]!r}; only plain LoRA adapters are merged."
            )
    result = dict(state)
    for module, down, up in _updates(adapter, source):
        weight = result.get(f"{module}.weight")
        if weight is None or weight.shape != (len(up), down.shape[1]):
            found = "the model has no such layer" if weight is None else f"that has {list(weight.shape)}"
            raise CheckpointError(f"{source} changes {module} by [{len(up)}, {down.shape[1]}], but {found}.")
        result[f"{module}.weight"] = weight + _factor(config, module) * (up @ down).to(weight)
    return result


def _updates(adapter: Mapping[str, Tensor], source: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Module, A and B of every layer that an adapter changes."""
    ends = (".lora_A.weight", ".lora_B.weight")
    strange = [name for name in adapter if not name.startswith(ADAPTER_PREFIX) or not name.endswith(ends)]
    if strange:
        raise CheckpointError(f"{source} holds {strange[0]}, which is no tensor of a LoRA adapter.")
    modules = {name.removeprefix(ADAPTER_PREFIX)[: -len(ends[0])] for name in adapter}
    for module in sorted(modules):
        down, up = (adapter.get(f"{ADAPTER_PREFIX}{module}{end}") for end in ends)
        if down is None or up is None:
            raise CheckpointError(f"{source} has only one of the two tensors of {module}.")
        yield module, down, up


def _factor(config: Mapping[str, Any], module: str) -> float:
    rank = _of_module(config, "rank_pattern", module, config["r"])
    alpha = _of_module(config, "alpha_pattern", module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], pattern: str, module: str, default: float) -> float:
    given = config.get(pattern) or {}
    return next((value for name, value in given.items() if f".{module}".endswith(f".{name}")), default)


def is_adapted(model: nn.Module) -> bool:
    """Whether LoRA updates, and nothing else, are trained."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(trained) and all("lora_" in name for name in trained)


def save_adapter(model: nn.Module, path: str | Path, *, base: str = "") -> None:
    """Write the LoRA updates of a model in training as an adapter folder of the official program.

    Args:
        model: a Chronos-2 with updates as `zoo finetune method=lora` adds them.
        base: name or folder of the model they belong to, for whoever loads the adapter.

    Raises:
        CheckpointError: there are none, or other weights are trained beside them, which no adapter holds.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    if not layers:
        raise CheckpointError("The model has no LoRA updates to write.")
    beside = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if beside:
        raise CheckpointError(
            f"An adapter holds LoRA updates alone, but {summarise(beside)} are trained as well: freeze them "
            "(finetune.freeze), or merge and write the whole model with save_folder."
        )
    tensors, first = {}, next(iter(layers.values()))
    for name, layer in layers.items():
        (key,) = layer.lora_A  # pyright: ignore[reportGeneralTypeIssues]
        tensors[f"{ADAPTER_PREFIX}{name}.lora_A.weight"] = layer.lora_A[key].weight  # pyright: ignore
        tensors[f"{ADAPTER_PREFIX}{name}.lora_B.weight"] = layer.lora_B[key].weight  # pyright: ignore
    (key,) = first.lora_A  # pyright: ignore[reportGeneralTypeIssues]
    config = {
        "auto_mapping": {"base_model_class": "Chronos2Model", "parent_library": "chronos.chronos2.model"},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": first.lora_alpha[key],  # pyright: ignore
        "lora_dropout": getattr(first.lora_dropout[key], "p", 0.0),  # pyright: ignore
        "peft_type": "LORA",
        "r": first.r[key],  # pyright: ignore
        "target_modules": sorted(layers),
        "task_type": None,
    }
    path = Path(path)
    save_tensors(tensors, path / ADAPTER_WEIGHTS, {"format": "pt"})
    _write_json(path / ADAPTER_CONFIG, config)
