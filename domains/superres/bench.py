"""`zoo bench suite=superres`: CATANet and DLGSANet beside their plain layouts, pictures and training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from domains.superres.models.catanet import CATANet
from zoo.bench.compare import Job, gradient_norm
from zoo.bench.peer import load_peer
from zoo.bench.suite import Case, Suite
from zoo.create import create_model
from zoo.weights.exchange import to_official

PEERS = {
    "catanet_x4": ("catanet", "PlainCATANet"),
    "dlgsanet_tiny_x4": ("dlgsanet", "PlainDLGSANet"),
}
"""Model -> module and class in `benchmarks/plain`."""
CROP = 48
"""Side of a low-resolution training crop."""


def contestants(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The model and its peer with the same weights, in evaluation; token centres as if they were trained."""
    torch.manual_seed(0)
    model = create_model(f"superres/{name}").eval()
    for key, buffer in model.named_buffers():
        if key.endswith("initted"):
            buffer.fill_(True)
    module, kind = PEERS[name]
    peer = getattr(load_peer(module), kind)().eval()
    peer.load_state_dict(to_official(model))
    return model.to(device), peer.to(device)


def pictures(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`(B, 3, H, W)` in [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)


def inference(
    name: str, width: int, height: int, *, target: float | None = None, rounds: int | None = None
) -> Case:
    """One picture of `width` x `height` pixels, enlarged four times.

    Token groups of CATANet are compared by themselves in its tests: where rounding sends a token to another
    centre, all that follow are moved, so that the result compared is that of the peer with our groups.
    """

    def build(device: torch.device) -> Job:
        model, peer = contestants(name, device)
        x = pictures((1, 3, height, width), device)

        def run(network: nn.Module, *groups: list[Tensor]) -> Callable[[], Tensor]:
            return torch.inference_mode()(lambda: network(x, *groups))

        same = [model.token_groups(x)] if isinstance(model, CATANet) else []
        return Job(name, run(model), run(peer), run(model), run(peer, *same))

    return Case(f"{name}, {width}x{height} pixels", build, target, items=1, rounds=rounds)


def training(name: str, batch: int) -> Case:
    """Forward, L1 and backward of a batch of crops; what is compared is the norm of all gradients."""

    def build(device: torch.device) -> Job:
        model, peer = (network.train() for network in contestants(name, device))
        x = pictures((batch, 3, CROP, CROP), device)
        target = pictures((batch, 3, 4 * CROP, 4 * CROP), device)

        def step(network: nn.Module) -> Callable[[], Tensor]:
            return lambda: gradient_norm(network, (network(x) - target).abs().mean())

        ours, theirs = step(model), step(peer)
        return Job(name, ours, theirs, ours, theirs)

    return Case(f"{name}, training step, {batch} crops of {CROP}x{CROP}", build, items=batch)


FASTER = {"catanet_x4": 2.5, "dlgsanet_tiny_x4": 4.0}
SUITE = Suite(
    tuple(
        case
        for name, target in FASTER.items()
        for case in (
            inference(name, 64, 64, target=target),
            inference(name, 256, 256, target=target, rounds=3),
            inference(name, 640, 360, target=target, rounds=1),
            training(name, 4),
        )
    )
)
