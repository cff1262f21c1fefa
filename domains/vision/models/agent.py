"""Agent-PVT and Agent-DeiT: Agent Attention (Han et al., ECCV 2024) in the layouts of PVT and DeiT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from domains.vision.models.deit import DeiT
from domains.vision.models.pvt import PVT
from domains.vision.weights.deit import AgentDeiTOfficial
from domains.vision.weights.pvt import AgentPVTOfficial
from zoo.attention.layers import AttentionLayer
from zoo.attention.layers.agent import AgentAttention
from zoo.errors import ConfigError
from zoo.registry import register_model


class AgentPVT(PVT):
    """PVT whose queries read the keys by way of a few agents, at a cost linear in the number of pixels.

    Args:
        agent_num: agents of each stage, square numbers.
        agent_sr_ratios: patches of so many pixels along each side give keys and values, in each stage; with 1
            all pixels do.
        options: of `domains.vision.models.pvt.PVT`; in `attn_types` the letter A is agent attention.
    """

    letter = "A"

    def __init__(
        self,
        *,
        agent_num: Sequence[int] = (9, 16, 49, 49),
        agent_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        depths: Sequence[int] = (2, 2, 2, 2),
        **options: Any,
    ) -> None:
        if not len(agent_num) == len(agent_sr_ratios) == len(depths):
            raise ConfigError("agent_num and agent_sr_ratios have one number for each stage.")
        self._agents, self._reductions = tuple(agent_num), tuple(agent_sr_ratios)
        super().__init__(depths=depths, **options)

    def make_attention(self, i: int, dim: int, num_heads: int, shape: tuple[int, ...]) -> nn.Module:
        return AgentAttention(
            dim,
            num_heads,
            shape=shape,
            agents=self._agents[i],
            reduction=self._reductions[i],
            qkv_bias=self.qkv_bias,
        )


class AgentDeiT(DeiT):
    """DeiT whose tokens, the class token included, read each other by way of a few agents.

    Args:
        agent_num: agents of every block, a square number.
        options: of `domains.vision.models.deit.DeiT`.
    """

    def __init__(self, *, agent_num: int = 49, **options: Any) -> None:
        self._agents = agent_num
        super().__init__(**options)

    def make_attention(self, dim: int, num_heads: int, shape: tuple[int, int]) -> AttentionLayer:
        return AgentAttention(
            dim, num_heads, shape=shape, agents=self._agents, class_token=True, qkv_bias=self.qkv_bias
        )


_family = partial(
    register_model,
    paper=(
        "Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024, "
        "arXiv 2312.08874"
    ),
    licence="none stated",
    source="https://github.com/LeapLabTHU/Agent-Attention",
    preprocessing={"resize": "256, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)
_register = partial(_family, model=AgentPVT, status="official parity", official=AgentPVTOfficial)
_UNCHECKED = "From a description of the form with a class token; not held to the official program."
_deit = partial(
    _family,
    model=AgentDeiT,
    status="re-implementation",
    official=AgentDeiTOfficial,
    notes=_UNCHECKED,
)


@_register(
    summary="Agent tokens in the layout of PVT, 12 M: 78.4 % on ImageNet-1k (authors)",
    weights=("agent_pvt_tiny_in1k",),
)
def agent_pvt_tiny(*, drop_path_rate: float = 0.1, **kwargs: Any) -> AgentPVT:
    return AgentPVT(drop_path_rate=drop_path_rate, **kwargs)


@_register(
    summary="Agent tokens in the layout of PVT, 21 M: 82.2 % on ImageNet-1k (authors)",
    weights=("agent_pvt_small_in1k",),
)
def agent_pvt_small(
    *, depths: Sequence[int] = (3, 4, 6, 3), drop_path_rate: float = 0.1, **kwargs: Any
) -> AgentPVT:
    return AgentPVT(depths=depths, drop_path_rate=drop_path_rate, **kwargs)


@_register(
    summary="Agent tokens in the layout of PVT, 36 M: 83.4 % on ImageNet-1k (authors)",
    weights=("agent_pvt_medium_in1k",),
)
def agent_pvt_medium(
    *, depths: Sequence[int] = (3, 4, 18, 3), drop_path_rate: float = 0.3, **kwargs: Any
) -> AgentPVT:
    return AgentPVT(depths=depths, drop_path_rate=drop_path_rate, **kwargs)


@_register(
    summary="Agent tokens in the layout of PVT, 49 M: 83.7 % on ImageNet-1k (authors)",
    weights=("agent_pvt_large_in1k",),
)
def agent_pvt_large(
    *, depths: Sequence[int] = (3, 8, 27, 3), drop_path_rate: float = 0.3, **kwargs: Any
) -> AgentPVT:
    return AgentPVT(depths=depths, drop_path_rate=drop_path_rate, **kwargs)


@_deit(
    summary="Agent tokens in the layout of DeiT, 6 M: 74.9 % on ImageNet-1k (authors)",
    weights=("agent_deit_tiny_in1k",),
)
def agent_deit_tiny(**kwargs: Any) -> AgentDeiT:
    return AgentDeiT(**kwargs)


@_deit(
    summary="Agent tokens in the layout of DeiT, 23 M: 80.5 % on ImageNet-1k (authors)",
    weights=("agent_deit_small_in1k",),
)
def agent_deit_small(
    *, embed_dim: int = 384, num_heads: int = 6, drop_path_rate: float = 0.1, **kwargs: Any
) -> AgentDeiT:
    return AgentDeiT(embed_dim=embed_dim, num_heads=num_heads, drop_path_rate=drop_path_rate, **kwargs)


@_deit(
    summary="Agent tokens in the layout of DeiT, 88 M: 82.0 % on ImageNet-1k (authors)",
    weights=("agent_deit_base_in1k",),
    notes=f"{_UNCHECKED} The authors count 87.2 M parameters; 81 agents in every block make 88.5 M.",
)
def agent_deit_base(
    *,
    embed_dim: int = 768,
    num_heads: int = 12,
    agent_num: int = 81,
    drop_path_rate: float = 0.3,
    **kwargs: Any,
) -> AgentDeiT:
    return AgentDeiT(
        embed_dim=embed_dim,
        num_heads=num_heads,
        agent_num=agent_num,
        drop_path_rate=drop_path_rate,
        **kwargs,
    )
