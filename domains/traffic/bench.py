"""`zoo bench domain=traffic`: GMAN against its plain layout, and how cost grows with the sensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from domains.traffic.losses import build_loss
from domains.traffic.models.gman import GMAN
from zoo.bench.compare import Job, compare, scaling
from zoo.bench.machine import machine
from zoo.bench.peer import load_peer
from zoo.bench.report import Curve, Report, Row
from zoo.bench.timing import Call, pinned
from zoo.create import create_model
from zoo.devices import chosen_device
from zoo.errors import ConfigError, did_you_mean
from zoo.registry import model_signature
from zoo.weights.exchange import to_official

MEAN, STD = 60.0, 12.0
"""Scale of the made-up speeds, in mph."""

TOLERANCES = {"float32": 1e-4, "compiled": 1e-4, "bfloat16": 5e-2}
"""Variants and the relative difference that their rounding allows."""


@dataclass(frozen=True)
class Batch:
    """Random readings of plausible size; times of the week run on from a random start."""

    x: Tensor
    """`[B, P, N]`, scaled"""
    y: Tensor
    """`[B, Q, N]`, mph, 8 % of them missing (zero)"""
    time: Tensor
    """`[B, P + Q, 2]`, weekday and slot of day"""

    @classmethod
    def random(
        cls, batch_size: int, history: int, horizon: int, num_nodes: int, device: torch.device
    ) -> Batch:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(batch_size, history, num_nodes, generator=draw)
        y = MEAN + STD * torch.randn(batch_size, horizon, num_nodes, generator=draw)
        y[torch.rand(y.shape, generator=draw) < 0.08] = 0
        start = torch.randint(7 * 288, (batch_size, 1), generator=draw)
        minute = (start + torch.arange(history + horizon)) % (7 * 288)
        time = torch.stack([minute // 288, minute % 288], dim=-1)
        return cls(x.to(device), y.to(device), time.to(device))


def bench(cfg: DictConfig) -> Report:
    """Time and memory of `cfg.model` beside its peer, and over the number of sensors.

    Raises:
        ConfigError: the model has no peer, or an unknown variant or device is asked for.
        ZooError: the model and its peer do not compute the same.
    """
    device = chosen_device(cfg.device, ("cpu", "cuda"))
    variants = cfg.variants or (list(TOLERANCES) if device.type == "cuda" else ["float32"])
    for variant in variants:
        if variant not in TOLERANCES:
            hint = did_you_mean(variant, TOLERANCES)
            raise ConfigError(f"There is no variant {variant!r}.{hint} Variants: {', '.join(TOLERANCES)}.")
    with pinned(cfg.threads):
        torch.manual_seed(cfg.seed)
        rows = [row for variant in variants for row in _rows(cfg, variant, device)]
        curves = _curves(cfg, device) if cfg.curve else []
        return Report(
            title=(
                f"{cfg.model.name}: batch {cfg.batch_size}, {cfg.history}+{cfg.horizon} steps, "
                f"{cfg.num_nodes} sensors"
            ),
            settings=_settings(cfg),
            machine=machine(device),
            rows=tuple(rows),
            curves=tuple(curves),
            growth_name="Training step over the number of sensors",
        )


# ---- beside the peer ---------------------------------------------------------------------------------------


def _rows(cfg: DictConfig, variant: str, device: torch.device) -> list[Row]:
    """Inference first: training steps move the two apart by rounding."""
    batch = Batch.random(cfg.batch_size, cfg.history, cfg.horizon, cfg.num_nodes, device)
    model = _build(cfg, cfg.num_nodes, device)
    _unsettle(model, batch)
    ours, peer = Run(model, batch, variant), Run(plain_peer(model), batch, variant)
    suffix = "" if variant == "float32" else f", {variant}"
    jobs = [
        Job("inference" + suffix, ours.infer, peer.infer, ours.infer, peer.infer),
        Job("training step" + suffix, ours.train, peer.train, ours.training_forecast, peer.training_forecast),
    ]
    return [compare(job, tolerance=TOLERANCES[variant], repeats=cfg.repeats, device=device) for job in jobs]


class Run:
    """One model on one batch, by forecasts or by whole training steps."""

    def __init__(self, model: nn.Module, batch: Batch, variant: str = "float32") -> None:
        self.batch = batch
        self.model = torch.compile(model) if variant == "compiled" else model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.loss = build_loss("masked_mae")
        low = torch.autocast(batch.x.device.type, dtype=torch.bfloat16)
        self.precision = low if variant == "bfloat16" else nullcontext()

    def infer(self) -> Tensor:
        self.model.eval()
        with torch.inference_mode():
            return self._forecast()

    def train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self.loss(self._forecast() * STD + MEAN, self.batch.y).backward()
        self.optimizer.step()

    def training_forecast(self) -> Tensor:
        """The forecast by batch statistics."""
        self.model.train()
        with torch.no_grad():
            return self._forecast()

    def _forecast(self) -> Tensor:
        with self.precision:
            return self.model(self.batch.x, self.batch.time).float()


def plain_peer(model: nn.Module) -> nn.Module:
    """The peer in `benchmarks/plain` with the same weights.

    Raises:
        ConfigError: there is none for this model.
    """
    if not isinstance(model, GMAN) or model.variant != "original" or model.unpublished or not model.norm:
        raise ConfigError(
            f"This {type(model).__name__} has no plain peer to be timed against. "
            "Models with one: gman, gman_metr_la, gman_paper, as published and with norm."
        )
    built: dict[str, Any] = model.__dict__["zoo_config"]
    options = {key: p.default for key, p in model_signature(built["name"]).items()} | built["config"]
    kept = ("num_layers", "num_heads", "head_dim", "history", "steps_per_day", "causal", "dropout")
    table = model.embedding.spatial_embedding
    peer = load_peer("gman").PlainGMAN(table.clone(), **{key: options[key] for key in kept})
    peer.load_official(to_official(model))
    return peer.to(table.device)


@torch.no_grad()
def _unsettle(model: nn.Module, batch: Batch) -> None:
    """Move biases and running statistics off their initial values, so that equality means something."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    model(batch.x, batch.time)


# ---- over the number of sensors ----------------------------------------------------------------------------


def _curves(cfg: DictConfig, device: torch.device) -> list[Curve]:
    """A training step of the model, of its grouped form, of the peer where it fits, and of further models."""
    sizes: list[int] = list(cfg.curve.num_nodes)
    small = [n for n in sizes if n <= cfg.curve.peer_up_to]

    def curve(name: str, build: Callable[[int], nn.Module], sizes: Sequence[int] = sizes) -> Curve:
        def step_at(num_nodes: int) -> Call:
            batch = Batch.random(cfg.curve.batch_size, cfg.history, cfg.horizon, num_nodes, device)
            return Run(build(num_nodes), batch).train

        return scaling(name, step_at, sizes, repeats=cfg.curve.repeats, device=device)

    def grouped(num_nodes: int) -> nn.Module:
        return _build(cfg, num_nodes, device, spatial_groups=best_groups(num_nodes))

    def other(name: str) -> Callable[[int], nn.Module]:
        return lambda n: create_model(name, num_nodes=n, history=cfg.history, horizon=cfg.horizon).to(device)

    return [
        curve("zoo", lambda n: _build(cfg, n, device)),
        curve("zoo, grouped", grouped),
        curve("peer", lambda n: plain_peer(_build(cfg, n, device)), small),
        *(curve(name, other(name)) for name in cfg.curve.models),
    ]


def best_groups(num_nodes: int) -> int:
    """Number of groups whose size is nearest to the cheapest, (2 N)^(1/3) (GMAN, group spatial attention)."""
    return math.ceil(num_nodes / round((2 * num_nodes) ** (1 / 3)))


# ---- what the config says ----------------------------------------------------------------------------------


def _build(cfg: DictConfig, num_nodes: int, device: torch.device, **more: Any) -> nn.Module:
    options = {key: value for key, value in cfg.model.items() if key != "name"} | more
    sizes = {"num_nodes": num_nodes, "history": cfg.history, "horizon": cfg.horizon}
    return create_model(cfg.model.name, **(sizes | options)).to(device)


def _settings(cfg: DictConfig) -> dict[str, Any]:
    chosen = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(chosen, dict)
    keys = ("model", "variants", "batch_size", "num_nodes", "history", "horizon", "repeats", "curve")
    return {key: chosen[key] for key in keys}
