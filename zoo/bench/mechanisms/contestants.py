"""The layers that are compared: all that the zoo lists, with arguments where the defaults do not do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from zoo.attention.layers import LAYERS, find_layer, layer_options
from zoo.errors import UnknownName


@dataclass(frozen=True)
class Arguments:
    """What a layer is built with."""

    short: dict[str, Any] = field(default_factory=dict)
    """On rows of 40 to 1,024 tokens with one head of 64 channels: reach and blocks are those of the published
    sizes, scaled down with the rows."""
    long: dict[str, Any] = field(default_factory=dict)
    """On rows of up to 16,384 tokens with 4 heads of 16 channels."""
    both_ways: dict[str, Any] | None = None
    """In the models of the domains, where tokens see later ones; None = as on short rows."""


_HEADS = {"num_heads": 4, "shared_heads": 1, "routed_heads": 2}
_GROUPS = {"num_heads": 4, "num_kv_heads": 2}
_NO_CONVOLUTION = {"kernel": None}  # the token model has one before every layer
_LATENT = {"kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "value_dim": 32}
_SELECTED = {"num_selected": 8, "num_global": 1, "num_local": 2, "num_instruction": 0, "chunk_size": 4}
ARGUMENTS: dict[str, Arguments] = {
    "abc": Arguments({"slots": 16}, {"slots": 64}),
    "agent": Arguments({"agents": 8}, {"agents": 64}),
    "bilevel": Arguments({"regions": 8, "topk": 2}, {"regions": 16}),
    "cca": Arguments({"head_dim": 32}, {"head_dim": 8}),
    "core_context": Arguments({"group_size": 4, "window": 8}, {"window": 128}),
    "deltanet": Arguments(_NO_CONVOLUTION),
    "deltanet_negative": Arguments({"negative": True, **_NO_CONVOLUTION}, {"negative": True}),
    "dgqa": Arguments(_GROUPS, _GROUPS),
    "dha": Arguments({"num_heads": 4, "key_heads": 2, "value_heads": 2}, {"key_heads": 2, "value_heads": 2}),
    "dhsa": Arguments(
        _SELECTED, {"num_selected": 256, "num_global": 32, "num_local": 64, "num_instruction": 0}
    ),
    "dsa": Arguments({"num_selected": 8}, {"num_selected": 256}),
    "gated_deltanet": Arguments(_NO_CONVOLUTION),
    "halo": Arguments({}, {"block": 64, "halo": 32}),
    "hcam": Arguments({"chunk_size": 8, "k": 2}),
    "kda": Arguments(_NO_CONVOLUTION),
    "kdgqa": Arguments(_GROUPS, _GROUPS),
    "landmark": Arguments({"block_size": 8}),
    "local": Arguments({"window": 8}, both_ways={"window": 9}),
    "lolcats": Arguments({"window": 8}, {"window": 64}),
    "mla": Arguments(
        {"kv_rank": 16, "nope_dim": 48, "rope_dim": 16, "value_dim": 64},
        {"kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "value_dim": 16},
    ),
    "moba": Arguments({"block_size": 8, "num_selected": 2}),
    "moh": Arguments(_HEADS, _HEADS),
    "moh_aggregated": Arguments(_HEADS | {"sr_ratio": 4}, _HEADS),
    "moh_cosine": Arguments(_HEADS, _HEADS),
    "moh_llama": Arguments(_HEADS, _HEADS),
    "neighbourhood": Arguments({}, {"kernel": 63}),
    "nsa": Arguments({"window": 8, "block_size": 8, "num_selected": 2}, {"window": 128, "num_selected": 4}),
    "nystrom": Arguments({"landmarks": 8}, {"landmarks": 64}),
    "pgqa": Arguments(_GROUPS, _GROUPS),
    "power": Arguments({"block_size": 4}, {"block_size": 64}),
    "rcmha": Arguments({}, {"max_length": 16_384}),
    "recycled": Arguments({"num_kept": 8, "stride": 4}, {"num_kept": 256}),
    "routing": Arguments({"num_clusters": 4, "window_size": 16}, {"num_clusters": 16, "window_size": 128}),
    "s2": Arguments({"num_heads": 2}),
    "shifted_window": Arguments({"window": 8}, {"window": 128}),
    "sparsed": Arguments({"block_size": 8}),
    "still": Arguments({"num_salient": 8, "window": 8}, {"num_salient": 64, "window": 64}),
    "titans": Arguments({"chunk_size": 8}),
    "titans_mac": Arguments({"segment": 16, "memory": {"chunk_size": 8}}),
    "titans_mag": Arguments({"window": 8, "memory": {"chunk_size": 8}}, {"window": 128}),
    "titans_mal": Arguments({"window": 8, "memory": {"chunk_size": 8}}, {"window": 128}),
    "tpla": Arguments(_LATENT, _LATENT),
}
"""By name of the contestant: a layer, or one of `VARIANTS`."""
VARIANTS = {"deltanet_negative": "deltanet"}
"""Further contestants, and the layers that they are with other arguments."""
SEES = {
    "abc": "sums",
    "agent": "some",
    "associative": "nothing",
    "channel": "sums",
    "clustered": "some",
    "core_context": "some",
    "cosformer": "sums",
    "delta": "sums",
    "features": "sums",
    "fit": "some",
    "fixed": "some",
    "halo": "near",
    "hcam": "some",
    "hilo": "some",
    "hybrid": "sums",
    "injective": "sums",
    "kronecker": "some",
    "landmark": "some",
    "linear": "sums",
    "local": "near",
    "magnitude": "sums",
    "moh_aggregated": "some",
    "neighbourhood": "near",
    "nystrom": "some",
    "regions": "some",
    "reused": "some",
    "routing": "some",
    "s2": "near",
    "slots": "sums",
    "spans": "some",
    "sparse": "some",
    "titans": "sums",
}
"""Of layers, or of whole families, that do not see all tokens one by one."""


@dataclass(frozen=True)
class Contestant:
    """A layer with its arguments, under the name that it has in the tables."""

    name: str

    @property
    def layer(self) -> str:
        return VARIANTS.get(self.name, self.name)

    @property
    def sees(self) -> str:
        """What a token sees, in a word of `zoo.bench.growth.MEANING`."""
        return SEES.get(self.layer) or SEES.get(find_layer(self.layer).family, "all")

    @property
    def causal(self) -> bool:
        """Whether it sees earlier tokens only on the synthetic tasks: where it can."""
        return find_layer(self.layer).supports.causal

    def short(self) -> dict[str, Any]:
        """For `create_attention`, on the synthetic tasks."""
        return {"name": self.layer, **ARGUMENTS.get(self.name, Arguments()).short}

    def both_ways(self) -> dict[str, Any]:
        """For the models of the domains."""
        arguments = ARGUMENTS.get(self.name, Arguments())
        given = arguments.short if arguments.both_ways is None else arguments.both_ways
        return {"name": self.layer, **given}

    def long(self) -> dict[str, Any]:
        """For `create_attention`, where the cost is measured."""
        return {"name": self.layer, **ARGUMENTS.get(self.name, Arguments()).long}


def several(given: str | Sequence[str] | None) -> list[str]:
    """What a setting such as `only=local` or `only=[local,linear]` names; nothing for null."""
    if given is None:
        return []
    return [given] if isinstance(given, str) else [str(part) for part in given]


def contestants(only: Sequence[str] = ()) -> tuple[Contestant, ...]:
    """All layers and variants, or those like one of `only`: names, parts of names, globs.

    A name that is one means that layer alone: `moh` is not `moh_llama`.

    Raises:
        UnknownName: nothing is like one of the parts.
    """
    find_layer("multihead")  # lists all of them
    names = sorted({*LAYERS, *VARIANTS})
    chosen: set[str] = set()
    for part in only or ["*"]:
        found = [name for name in names if name == part] or [
            name for name in names if fnmatchcase(name, f"*{part}*")
        ]
        if not found:
            raise UnknownName(f"No attention compared is like {part!r}: {', '.join(names)}.")
        chosen |= {*found}
    return tuple(Contestant(name) for name in names if name in chosen)


def lacking(contestant: Contestant) -> list[str]:
    """Arguments that a layer needs and this table does not give."""
    given = contestant.short()
    options = layer_options(find_layer(contestant.layer))
    return [
        name
        for name, option in options.items()
        if option.default is option.empty and name not in given and name != "num_heads"
    ]
