"""`zoo bench suite=vision`: the backbones beside their plain layouts and beside timm, at 224 x 224."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zoo.bench.compare import Job
from zoo.bench.peer import load_peer
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call
from zoo.create import create_model
from zoo.weights.exchange import to_official

PEERS = {
    "biformer_tiny": ("biformer", "PlainBiFormer"),
    "efficientvit_m0": ("efficientvit", "PlainEfficientViT"),
    "lwganet_l0": ("lwganet", "PlainLWGANet"),
}
"""Model -> module and class in `benchmarks/plain`."""


def settled(name: str, **options: Any) -> nn.Module:
    """The model, its norms moved off their initial values so that equal results mean something."""
    torch.manual_seed(0)
    model = create_model(f"vision/{name}", **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.running_var, 0.8, 1.2)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model


def plain_peer(name: str, model: nn.Module) -> nn.Module:
    """The peer with the same weights."""
    module, kind = PEERS[name]
    peer = getattr(load_peer(module), kind)()
    peer.load_state_dict(to_official(model), strict=False)  # without counters and constant tables
    return peer.eval()


def inference(
    name: str, batch: int, *, fuse: bool = False, other: str = "", target: float | None = None, form: str = ""
) -> Case:
    """Images to logits, the peer being the plain layout, or `other`, a model of timm. The results compared
    are always those of the plain layout.

    Args:
        form: `bfloat16` (autocast) or `compiled`, of both contestants on a GPU; float32 by default.
    """

    def build(device: torch.device) -> Job:
        model = settled(name)
        peer = plain_peer(name, model).to(device)
        ours = (model.fuse() if fuse else model).to(device)  # pyright: ignore[reportCallIssue]
        timed = timm.create_model(other).eval().to(device) if other else peer
        x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)

        def run(network: nn.Module) -> Callable[[], Tensor]:
            program = torch.compile(network) if form == "compiled" else network

            @torch.inference_mode()
            def call() -> Tensor:
                with torch.autocast(device.type, torch.bfloat16, enabled=form == "bfloat16"):
                    return program(x)

            return call

        return Job(name, run(ours), run(timed), run(ours), run(peer))

    done = " ".join(filter(None, (name, "fused" if fuse else "", form)))
    beside = f"timm's {other.partition('_patch')[0]}" if other else "plain layout"
    return Case(
        f"{done}, batch {batch}, {beside}",
        build,
        target,
        tolerance=5e-2 if form == "bfloat16" else 1e-4,
        items=batch,
        device="cuda" if form else None,
    )


def beside_timm(name: str, batch: int, side: int = 224) -> Case:
    """The fused model beside timm's of that name, with the same weights."""

    def build(device: torch.device) -> Job:
        model = settled(name)
        peer = timm.create_model(name).eval()
        peer.load_state_dict(to_official(model))
        ours, peer = model.fuse().to(device), peer.to(device)  # pyright: ignore[reportCallIssue]
        x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)

        def run(network: nn.Module) -> Callable[[], Tensor]:
            return torch.inference_mode()(lambda: network(x))

        return Job(name, run(ours), run(peer), run(ours), run(peer))

    return Case(f"{name} fused, batch {batch}, timm's with the same weights", build, items=batch)


def training(name: str, batch: int) -> Case:
    """Forward, cross entropy and backward beside the plain layout, batch norms as in evaluation."""

    def build(device: torch.device) -> Job:
        model = settled(name)
        peer = plain_peer(name, model).to(device)
        model = model.to(device)
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(batch, 3, 224, 224, generator=draw).to(device)
        labels = torch.randint(1000, (batch,), generator=draw).to(device)

        def step(network: nn.Module) -> Callable[[], Tensor]:
            def run() -> Tensor:
                network.zero_grad()
                loss = nn.functional.cross_entropy(network(x), labels)
                loss.backward()
                return loss

            return run

        ours, theirs = step(model), step(peer)
        return Job(name, ours, theirs, ours, theirs)

    return Case(f"{name}, training step, batch {batch}, plain layout", build, items=batch)


def at_sides(name: str, *, sides: tuple[int, ...] = (224, 448, 672, 1024), **options: Any) -> Growth:
    """Inference of one square image, by its side in pixels; by a model with these options."""

    def build(side: int, device: torch.device) -> Call:
        model = settled(name, **options).to(device)
        x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        return torch.inference_mode()(lambda: model(x))

    given = "".join(f" {key}={value}" for key, value in options.items())
    return Growth(f"{name}{given}, one image, by pixels per side", build, sides)


SWIN = "swin_tiny_patch4_window7_224"
ON_GPU = [
    inference(name, batch, fuse=name != "biformer_tiny", form=form)
    for name in PEERS
    for form in ("bfloat16", "compiled")
    for batch in (1, 32)
]
SUITE = Suite(
    (
        inference("biformer_tiny", 1, other=SWIN, target=1 / 0.65),
        inference("biformer_tiny", 1),
        inference("biformer_tiny", 32, other=SWIN),
        inference("biformer_tiny", 32),
        training("biformer_tiny", 8),
        inference("efficientvit_m0", 1, fuse=True, other="efficientvit_m0", target=1.5),
        inference("efficientvit_m0", 8, fuse=True, other="efficientvit_m0", target=1.0),
        inference("efficientvit_m0", 32, fuse=True, other="efficientvit_m0", target=1.0),
        inference("efficientvit_m0", 1, fuse=True),
        inference("efficientvit_m0", 32, fuse=True),
        training("efficientvit_m0", 8),
        inference("lwganet_l0", 1, fuse=True, target=1.6),
        inference("lwganet_l0", 1),
        inference("lwganet_l0", 32, fuse=True),
        training("lwganet_l0", 8),
        beside_timm("davit_tiny", 1),
        beside_timm("davit_tiny", 8),
        beside_timm("halonet50ts", 1, side=256),
        beside_timm("halonet50ts", 8, side=256),
        *ON_GPU,
    ),
    growth=(
        at_sides("biformer_tiny"),
        at_sides("efficientvit_m0"),
        at_sides("mala_tiny", sides=(224, 448, 672)),
        at_sides("mala_tiny", sides=(224, 448, 672), block_types="vvvv"),
    ),
)
