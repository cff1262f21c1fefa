"""`zoo bench suite=image_attention`: the attention layers of the zoo on images, side by side.

Accuracy: one small network, the same for all but for its attention, learns to read a handwritten digit of
8 x 8 pixels that is drawn at 12 x 12 somewhere on a canvas of 24 x 24, from 600 digits in 8 epochs; it is
tested on the last quarter of the file. Cost: forward and backward of one layer as the tokens of a map grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from domains.vision.attention import map_attention, on_map
from domains.vision.compare_report import Comparison, Entry
from domains.vision.sources import Images, digits
from zoo.attention.layers import auxiliary_loss
from zoo.bench.compare import scaling
from zoo.bench.fit import fit
from zoo.bench.machine import machine
from zoo.bench.report import Curve
from zoo.bench.timing import Call
from zoo.errors import UnknownName

CANVAS, DIGIT, PATCH = 24, 12, 2
DIM, HEADS, DEPTH = 32, 4, 2
LAYER_DIM, LAYER_HEADS = 64, 4
"""Of the layer whose cost is measured."""


@dataclass(frozen=True)
class Contestant:
    """An attention layer with the arguments that it is compared with."""

    sees: str
    """What a token sees, in a word: the groups of the table and of the picture."""
    options: dict[str, Any] = field(default_factory=dict)
    alternate: dict[str, Any] = field(default_factory=dict)
    """Arguments of every second block that differ."""
    largest: int = 16_384
    """Tokens, beyond which it takes gigabytes."""


_GATES = {"shared_heads": 1, "routed_heads": 2}
CONTESTANTS: dict[str, Contestant] = {
    "none": Contestant("nothing"),
    "multihead": Contestant("all"),
    "cascaded": Contestant("all", {"key_dim": 8}),
    "moh": Contestant("all", _GATES),
    "moh_cosine": Contestant("all", _GATES, largest=1024),
    "shifted_window": Contestant("near", {"window": 6}, {"shift": 3}),
    "neighbourhood": Contestant("near", {"kernel": 7}),
    "halo": Contestant("near", {"block": 4, "halo": 2}),
    "bilevel": Contestant("some", {"regions": 8, "topk": 4}),
    "hilo": Contestant("some", {"window": 2, "alpha": 0.5}),
    "agent": Contestant("some", {"agents": 16}),
    "moh_aggregated": Contestant("some", _GATES | {"sr_ratio": 4}),
    "linear": Contestant("sums"),
    "magnitude": Contestant("sums"),
    "injective": Contestant("sums"),
    "channel_groups": Contestant("sums"),
}


@dataclass(frozen=True)
class Budget:
    """How much is spent."""

    seeds: int = 3
    images: int = 600
    epochs: int = 8
    batch_size: int = 30
    tokens: tuple[int, ...] = (256, 1024, 4096, 16_384)


QUICK = Budget(seeds=1, images=60, epochs=1, tokens=(64, 256))


def run(cfg: DictConfig, device: torch.device) -> Comparison:
    """All contestants, or those like `cfg.only`.

    Raises:
        UnknownName: none is like it.
    """
    chosen = {name: c for name, c in CONTESTANTS.items() if fnmatchcase(name, f"*{cfg.only or '*'}*")}
    if not chosen:
        raise UnknownName(f"No attention compared is like {cfg.only!r}: {', '.join(CONTESTANTS)}.")
    budget = QUICK if cfg.quick else Budget()
    entries = tuple(
        _entry(name, contestant, budget, cfg.repeats, cfg.seed, device) for name, contestant in chosen.items()
    )
    settings = {key: cfg[key] for key in ("suite", "only", "quick", "repeats", "seed")}
    return Comparison(settings, machine(device), entries, cfg.picture)


def _entry(
    name: str, contestant: Contestant, budget: Budget, repeats: int, seed: int, device: torch.device
) -> Entry:
    trained = [learned(name, contestant, budget, seed + i, device) for i in range(budget.seeds)]
    return Entry(
        name,
        contestant.sees,
        contestant.options,
        parameters=trained[0].parameters,
        accuracies=tuple(result.accuracy for result in trained),
        training_seconds=fmean(result.seconds for result in trained),
        curve=None if contestant.sees == "nothing" else grown(name, contestant, budget, repeats, device),
    )


# ---- accuracy ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A depthwise convolution that tells positions, attention and an MLP, each beside a residual."""

    def __init__(self, name: str, options: dict[str, Any], seen: bool) -> None:
        super().__init__()
        side = CANVAS // PATCH
        self.pos = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = map_attention({"name": name, **options}, DIM, HEADS, (side, side)) if seen else None
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.attn is not None:
            x = x + on_map(self.attn, self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Isotropic(nn.Module):
    """Canvases `(B, 1, 24, 24)` to logits `(B, 10)`, through blocks on a map of 12 x 12 tokens."""

    def __init__(self, name: str, contestant: Contestant) -> None:
        super().__init__()
        conv = nn.Conv2d(1, DIM, 2 * PATCH, PATCH, PATCH // 2, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(DIM), nn.GELU())
        options = [
            contestant.options | contestant.alternate if i % 2 else contestant.options for i in range(DEPTH)
        ]
        self.blocks = nn.Sequential(*(Block(name, o, contestant.sees != "nothing") for o in options))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


@dataclass(frozen=True)
class Learned:
    accuracy: float
    """Share of the test digits, in percent."""
    seconds: float
    """Of the training; CPU time where torch computes on one thread."""
    parameters: int


def learned(name: str, contestant: Contestant, budget: Budget, seed: int, device: torch.device) -> Learned:
    """The network with an attention layer, trained and tested."""
    parts = digits().parts
    x, y = canvases(parts["train"], budget.images, seed, device)
    torch.manual_seed(seed)
    model = Isotropic(name, contestant).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = budget.epochs * -(-len(x) // budget.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    seconds = fit(
        model,
        lambda chosen: F.cross_entropy(model(x[chosen]), y[chosen]),
        optimizer,
        schedule,
        steps=steps,
        rows=len(x),
        batch_size=budget.batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    accuracy = 100 * _accuracy(model.eval(), *canvases(parts["test"], budget.images, seed, device))
    return Learned(accuracy, seconds, sum(p.numel() for p in model.parameters()))


@torch.inference_mode()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found = torch.cat([model(part).argmax(-1) for part in x.split(100)])
    return float((found == y).float().mean())


def canvases(images: Images, limit: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first digits of a part, each somewhere on a canvas: `(n, 1, 24, 24)` in 0 .. 1, and labels."""
    count = min(limit, len(images))
    pixels = np.stack([np.asarray(images.read(i))[..., 0] for i in range(count)])[:, None]
    small = F.interpolate(torch.from_numpy(pixels / 255).float(), (DIGIT, DIGIT), mode="bilinear")
    out = torch.zeros(count, 1, CANVAS, CANVAS)
    draw = torch.Generator().manual_seed(seed)
    for digit, canvas in zip(small, out, strict=True):
        row, column = torch.randint(CANVAS - DIGIT + 1, (2,), generator=draw).tolist()
        canvas[:, row : row + DIGIT, column : column + DIGIT] = digit
    return out.to(device), torch.from_numpy(images.labels[:count]).to(device)


# ---- cost --------------------------------------------------------------------------------------------------


def grown(name: str, contestant: Contestant, budget: Budget, repeats: int, device: torch.device) -> Curve:
    """Time and peak memory of forward and backward of one layer over the tokens of a square map.

    The median of the rounds; of the largest map, one round.
    """

    def at(tokens: int) -> Call:
        side = round(tokens**0.5)
        torch.manual_seed(0)
        layer = map_attention({"name": name, **contestant.options}, LAYER_DIM, LAYER_HEADS, (side, side))
        layer = layer.to(device)
        x = torch.randn(1, side, side, LAYER_DIM, device=device, requires_grad=True)

        def forward_and_backward() -> None:
            layer.zero_grad()
            on_map(layer, x).sum().backward()
            auxiliary_loss(layer)

        return forward_and_backward

    sizes = [tokens for tokens in budget.tokens if tokens <= contestant.largest]
    parts = [_measured(name, at, size, 1 if size == 16_384 else repeats, device) for size in sizes]
    return Curve(name, tuple(point for part in parts for point in part.points))


def _measured(name: str, at: Callable[[int], Call], size: int, repeats: int, device: torch.device) -> Curve:
    return scaling(name, at, [size], repeats=repeats, device=device)
