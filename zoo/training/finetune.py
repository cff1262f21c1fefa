"""Starting from trained weights: what is taken over, and what is trained further."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from zoo.attention.layers import AttentionLayer
from zoo.cli.console import console
from zoo.create import create_model
from zoo.errors import ConfigError, did_you_mean, require
from zoo.registry import model_signature
from zoo.weights.checkpoint import LoadReport, load_state, matches, read_checkpoint

METHODS = ("full", "head", "lora", "probe")
PROBES = ("linear", "attentive")

PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value")
"""What models call the linear layers that make queries, keys and values."""


def starting_point(path: str | Path, kwargs: Mapping[str, Any]) -> tuple[nn.Module, LoadReport]:
    """The model of a checkpoint, made for other data.

    Args:
        path: a `model.safetensors` of ours, with its config.
        kwargs: what the new data decide of the constructor arguments.

    Returns:
        The model, and what was loaded: tensors whose shape the new arguments change stay at init.

    Raises:
        CheckpointError: the file cannot be read, or does not fit in other ways.
    """
    state, meta = read_checkpoint(path)
    built = meta["model"]
    name = f"{built['domain']}/{built['name']}"
    given = {key: value for key, value in kwargs.items() if key in model_signature(name)}
    model = create_model(name, **(built["config"] | given))
    own = model.state_dict()
    other = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    return model, load_state(model, state, skip=other, source=str(path))


def changes(cfg: DictConfig, allowed: Sequence[str]) -> dict[str, Any]:
    """The arguments of the model that `cfg.changes` wants different from the checkpoint's.

    Raises:
        ConfigError: one that is not among `allowed`.
    """
    wanted = dict(OmegaConf.select(cfg, "changes", default={}))
    if refused := [f"model.{name}={value}" for name, value in wanted.items() if name not in allowed]:
        may = f" Of its arguments, {', '.join(allowed)} may change." if allowed else ""
        raise ConfigError(
            f"zoo finetune takes the model from the checkpoint; leave out {' '.join(refused)}.{may}"
        )
    return wanted


def adapt(model: nn.Module, cfg: DictConfig) -> None:
    """Choose what is trained, by `cfg.method`: in place.

    `full`: everything. `head`: the head alone. `probe`: a fresh head on frozen features, see `fresh_probe`.
    `lora`: low-rank updates of linear layers and 1 x 1 convolutions (Hu et al. 2022) and the head. The head
    is what `model.head_modules` names, else `model.head`, with the weights of `model.pool` if it has some,
    else the last child. Names that match `cfg.freeze` stay frozen under any method. A module whose parameters
    are all frozen runs in eval mode, so that its running statistics stay, too; nothing in front of what is
    trained is kept for a backward pass.

    Raises:
        ConfigError: unknown method, or a `freeze` glob or LoRA target that matches nothing.
        MissingExtra: `lora` without peft.
    """
    if cfg.method not in METHODS:
        raise ConfigError(
            f"There is no method={cfg.method}.{did_you_mean(cfg.method, METHODS)} "
            f"Methods: {', '.join(METHODS)}."
        )
    if cfg.method == "probe":
        fresh_probe(model, cfg.probe)
    linear_probe = cfg.method == "probe" and cfg.probe.kind == "linear"
    heads = tuple(f"{name}." for name in _heads(model) if not (linear_probe and name == "pool"))
    trainable = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith(heads)]
    if cfg.method != "full":
        model.requires_grad_(False)
    if cfg.method == "lora":
        _add_lora(model, cfg.lora)
    for parameter in trainable:
        parameter.requires_grad_(True)
    _freeze(model, list(cfg.freeze))
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    console.print(f"{cfg.method}: {trained:,} of {total:,} parameters are trained", highlight=False)


def merge_lora(model: nn.Module) -> None:
    """Add the low-rank updates to the weights they belong to, so that the plain model is left."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def fresh_probe(model: nn.Module, cfg: DictConfig) -> None:
    """Give a model a fresh head, and write into its config what that changes: in place.

    `linear`: a linear layer. `attentive`: learned queries over the tokens before it (`cfg.attentive` holds
    the arguments of the pool). Models whose head can be reset get a batch norm without weights of its own
    before the linear layer, as in the probes of masked autoencoders, unless their head starts with a norm.

    Raises:
        ConfigError: unknown kind of probe, or a model that has no pool to exchange.
    """
    kind = cfg.kind
    if kind not in PROBES:
        raise ConfigError(
            f"There is no probe={kind}.{did_you_mean(kind, PROBES)} Probes: {', '.join(PROBES)}."
        )
    built: Any = model.zoo_config
    if hasattr(model, "reset_classifier"):
        backbone: Any = model
        changes: dict[str, Any] = {"head_norm": type(backbone.head) is nn.Linear}
        if kind == "attentive":
            options = OmegaConf.to_container(cfg.attentive, resolve=True)
            changes["global_pool"] = {"name": "attentive", **cast(dict, options)}
        backbone.reset_classifier(backbone.num_classes, **changes)
        built["config"] = built["config"] | changes
        return
    if kind != "linear":
        raise ConfigError(f"Model {built['name']!r} has no pool to exchange: probe=linear alone works.")
    fresh = create_model(f"{built['domain']}/{built['name']}", **built["config"])
    for head in _heads(model):
        model.get_submodule(head).load_state_dict(fresh.get_submodule(head).state_dict())


def _heads(model: nn.Module) -> list[str]:
    """Names of the modules that are the head."""
    if named := getattr(model, "head_modules", ()):
        return list(named)
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [name for name in names if name in ("pool", "head")] if "head" in names else names[-1:]


def _freeze(model: nn.Module, globs: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(matches(name, [glob]) for name in names):
            raise ConfigError(f"finetune.freeze: no parameter matches {glob!r}.{did_you_mean(glob, names)}")
    for name, parameter in model.named_parameters():
        if matches(name, globs):
            parameter.requires_grad_(False)


def _add_lora(model: nn.Module, cfg: DictConfig) -> None:
    peft = require("peft", "llm")
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    chosen = [n for n in linear if matches(n, cfg.target)] if cfg.target else _in_attention(model, linear)
    if not chosen:
        raise ConfigError(
            "No linear layer for LoRA: "
            + (f"none matches {list(cfg.target)}; " if cfg.target else "none in attention; ")
            + (
                f"the model has {', '.join(list(linear)[:8])}. Set finetune.lora.target."
                if linear
                else "the model has none."
            )
        )
    config = peft.LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=chosen,
        fan_in_fan_out=any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in chosen),
    )
    peft.inject_adapter_in_model(config, model)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.__class__ = _whole_weight(type(module))


@cache
def _whole_weight(kind: type) -> type:
    """A LoRA layer whose `weight` holds its update, for models that read weights instead of calling layers.

    peft's own is that of the frozen layer, and what is read there would not be trained.
    """

    def weight(layer: Any) -> Tensor:
        frozen = layer.get_base_layer().weight
        if layer.merged or layer.disable_adapters:
            return frozen
        updates = [layer.get_delta_weight(name) for name in layer.active_adapters]
        return frozen + torch.stack(updates).sum(0) if updates else frozen

    return type(kind.__name__, (kind,), {"weight": property(weight), "__module__": kind.__module__})


def _in_attention(model: nn.Module, linear: Iterable[str]) -> list[str]:
    """By a module that is one of attention, in name or in kind, or else by the usual names of projections."""
    modules = [name for name, module in model.named_modules() if name and _is_attention(module)]
    inside = [n for n in linear if "att" in n.lower() or any(n.startswith(f"{m}.") for m in modules)]
    return inside or [name for name in linear if name.rpartition(".")[2] in PROJECTIONS]


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, AttentionLayer) or type(module).__name__.endswith("Attention")


def _is_linear(module: nn.Module) -> bool:
    """Also a convolution of single pixels."""
    if type(module) is nn.Conv2d:
        return module.kernel_size == (1, 1) and module.groups == 1
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"
