"""Every vision backbone at a size for tests, and what its tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import zoo

SMALL: dict[str, dict] = {
    "biformer_digits": {
        "depths": [1, 1, 1],
        "embed_dims": [8, 8, 16],
        "topks": [1, 2, -2],
        "mlp_ratios": [2, 2, 2],
        "head_dim": 4,
        "n_win": 2,
    },
    "agent_deit_base": {"embed_dim": 16, "depth": 3, "num_heads": 1, "agent_num": 4, "qkv_bias": False},
    "agent_deit_small": {"embed_dim": 16, "depth": 3, "num_heads": 4, "agent_num": 9, "patch_size": 8},
    "agent_deit_tiny": {"embed_dim": 24, "depth": 3, "num_heads": 3},
    "agent_pvt_tiny": {
        "embed_dims": [8, 16, 16, 32],
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "agent_pvt_small": {
        "embed_dims": [8, 8, 16],
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 2],
        "mlp_ratios": [2, 2, 2],
        "agent_num": [4, 9, 4],
        "agent_sr_ratios": [4, 2, 1],
    },
    "agent_pvt_medium": {
        "embed_dims": [8, 8, 16],
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 2],
        "mlp_ratios": [2, 2, 2],
        "agent_num": [4, 4, 4],
        "agent_sr_ratios": [1, 1, 1],
        "attn_types": "BBA",
        "sr_ratios": [8, 4, 1],
    },
    "agent_pvt_large": {
        "embed_dims": [8, 8, 16],
        "depths": [1, 2, 1],
        "num_heads": [1, 1, 2],
        "mlp_ratios": [2, 2, 2],
        "agent_num": [1, 4, 16],
        "agent_sr_ratios": [1, 1, 1],
        "qkv_bias": False,
    },
    "biformer_tiny": {
        "depths": [1, 1, 2, 1],
        "embed_dims": [16, 16, 32, 64],
        "head_dim": 8,
        "n_win": 2,
        "topks": [1, 2, 3, -2],
    },
    "biformer_small": {
        "depths": [1, 1, 1, 2],
        "embed_dims": [8, 16, 16, 32],
        "head_dim": 8,
        "n_win": [4, 3, 2, 1],
        "topks": [3, 2, 0, -1],
        "layer_scale": 0.1,
    },
    "biformer_base": {
        "depths": [1, 1, 1, 1],
        "embed_dims": [8, 16, 16, 24],
        "head_dim": 4,
        "qk_dims": [8, 8, 16, 24],
        "n_win": 3,
        "topks": [1, 4, 9, 1],
        "side_dwconv": 3,
        "pos_dwconv": 0,
    },
    "biformer_stl": {
        "depths": [1, 1, 1, 1],
        "embed_dims": [8, 16, 16, 32],
        "head_dim": 8,
        "n_win": 2,
        "topks": [1, 2, 4, -2],
        "channel_norm": True,
    },
    "biformer_stl_nchw": {
        "depths": [1, 1, 1, 1],
        "embed_dims": [8, 16, 16, 32],
        "head_dim": 8,
        "n_win": 2,
        "topks": [1, 2, 4, -1],
    },
    "davit_tiny": {"depths": [1, 1, 2, 1], "embed_dims": [8, 16, 16, 24], "num_heads": [1, 2, 2, 3]},
    "davit_small": {"depths": [1, 1, 1], "embed_dims": [8, 16, 24], "num_heads": [2, 2, 3], "window_size": 4},
    "davit_base": {
        "depths": [1, 1, 1],
        "embed_dims": [8, 16, 16],
        "num_heads": [1, 2, 2],
        "mlp_ratio": 2.0,
    },
    "davit_large": {"depths": [1, 1, 1], "embed_dims": [16, 16, 16], "num_heads": [1, 2, 4]},
    "davit_huge": {"depths": [1, 1, 1], "embed_dims": [16, 16, 24], "num_heads": [1, 2, 3]},
    "davit_giant": {"depths": [1, 2, 1], "embed_dims": [16, 16, 16], "num_heads": [1, 2, 2]},
    "davit_base_fl": {"depths": [1, 1, 1], "embed_dims": [8, 16, 24], "num_heads": [2, 2, 3]},
    "davit_huge_fl": {
        "depths": [1, 1, 1],
        "embed_dims": [8, 16, 16],
        "num_heads": [1, 2, 4],
        "window_size": 5,
    },
    "dhvt_small_cifar_patch2": {"embed_dim": 8, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
    "dhvt_small_cifar_patch4": {"embed_dim": 16, "depth": 3, "num_heads": 4},
    "dhvt_small_imagenet_patch16": {"embed_dim": 16, "depth": 3, "num_heads": 2},
    "dhvt_tiny_cifar_patch2": {"embed_dim": 8, "depth": 3, "num_heads": 1, "mlp_ratio": 2},
    "dhvt_tiny_cifar_patch4": {"embed_dim": 12, "depth": 4, "num_heads": 3},
    "dhvt_tiny_imagenet_patch16": {"embed_dim": 24, "depth": 3, "num_heads": 3},
    "efficientvit_m0": {"dims": [24, 32, 48], "depths": [1, 1, 2], "num_heads": [2, 2, 3], "key_dim": 8},
    "efficientvit_m1": {
        "dims": [8, 12, 16],
        "depths": [1, 1, 1],
        "num_heads": [1, 3, 2],
        "key_dim": [4, 8, 4],
    },
    "efficientvit_m2": {"dims": [24, 16, 16], "num_heads": [4, 2, 1], "window_size": [3, 4, 5]},
    "efficientvit_m3": {"dims": [24, 24, 32], "depths": [1, 1, 1], "shrink_windows": False},
    "efficientvit_m4": {"dims": [24, 24, 32], "depths": [1, 1, 1], "window_size": [7, 5, 2]},
    "efficientvit_m5": {"dims": [24, 24, 32], "depths": [1, 1, 1], "key_dim": 4},
    "inline_deit_base": {"embed_dim": 16, "depth": 3, "num_heads": 1, "patch_size": 8},
    "inline_deit_small": {"embed_dim": 16, "depth": 3, "num_heads": 4, "qkv_bias": False},
    "inline_deit_tiny": {"embed_dim": 24, "depth": 3},
    "inline_pvt_tiny": {
        "embed_dims": [8, 16, 16, 32],
        "depths": [1, 1, 2, 1],
        "num_heads": [2, 2, 4, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "inline_pvt_small": {
        "embed_dims": [8, 8, 16],
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 2],
        "mlp_ratios": [2, 2, 2],
        "features": "relu",
    },
    "inline_pvt_medium": {
        "embed_dims": [8, 8, 16],
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 2],
        "mlp_ratios": [2, 2, 2],
        "attn_types": "IIB",
        "sr_ratios": [1, 1, 2],
    },
    "inline_pvt_large": {
        "embed_dims": [8, 8, 16],
        "depths": [1, 2, 1],
        "num_heads": [1, 1, 2],
        "mlp_ratios": [2, 2, 2],
        "qkv_bias": False,
    },
    "eca_halonext26ts": {
        "dims": [16, 32, 32, 64],
        "depths": [1, 1, 2, 1],
        "attention_blocks": [[], [], [1], [0]],
        "num_heads": [1, 1, 2, 4],
        "dim_head": 4,
        "group_width": 4,
        "block_size": 4,
        "stem_dim": 16,
    },
    "halonet26t": {
        "dims": [32, 32, 64, 64],
        "attention_blocks": [[0], [], [1], [0, 1]],
        "num_heads": [1, 1, 2, 4],
        "stem_dim": 8,
    },
    "halonet50ts": {
        "dims": [32, 32, 64, 96],
        "depths": [1, 2, 1, 1],
        "attention_blocks": [[], [1], [0], [0]],
        "num_heads": [1, 2, 2, 4],
        "block_size": 5,
        "halo_size": 1,
        "stem_dim": 16,
    },
    "litv2_s": {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "alpha": 0.5},
    "litv2_m": {
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "local_ws": [0, 4, 3, 2],
        "qkv_bias": False,
    },
    "litv2_b": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "mlp_ratio": 2.0},
    "lwganet_l0": {"dim": 16, "depths": [1, 1, 1, 1], "head_width": 24},
    "lwganet_l1": {"dim": 8, "depths": [1, 2, 1, 1], "kernel_sizes": [7, 5, 3, 3], "mlp_ratio": 3.0},
    "lwganet_l2": {"dim": 24, "depths": [1, 1, 1, 2], "head_width": 40},
    "mala_tiny": {
        "embed_dims": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 3, 4],
        "projection": 40,
    },
    "mala_small": {
        "embed_dims": [8, 8, 16, 16],
        "depths": [1, 2, 1, 1],
        "num_heads": [2, 1, 4, 2],
        "layer_scales": [None, None, 0.5, 0.5],
        "projection": 24,
    },
    "mala_base": {
        "embed_dims": [8, 16, 16, 24],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 3],
        "block_types": ["v", "v", "l", "l"],
        "projection": 24,
    },
    "mala_large": {
        "embed_dims": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "mlp_ratios": [2, 3, 3.5, 4],
        "projection": 16,
    },
    "sehalonet33ts": {
        "dims": [32, 32, 64, 64],
        "depths": [1, 1, 2, 1],
        "attention_blocks": [[], [], [1], [0]],
        "num_heads": [1, 1, 2, 4],
        "block_size": 4,
        "last_dim": 48,
        "stem_dim": 16,
    },
    "spectformer_base": {"embed_dim": 16, "depth": 3, "num_spectral": 1, "num_heads": 2},
    "spectformer_small": {"embed_dim": 24, "depth": 4, "num_spectral": 0, "patch_size": 32},
    "spectformer_tiny": {"embed_dim": 16, "depth": 3, "num_spectral": 3, "img_size": 96},
    "spectformer_xs": {"embed_dim": 24, "depth": 4, "num_spectral": 2, "img_size": [64, 112]},
    "sret_lt": {
        "embed_dims": [8, 16, 16],
        "depths": [2, 3, 1],
        "num_blocks": [2, 1, 1],
        "num_heads": [1, 2, 4],
        "groups": [5, 2, 1],
        "recursive_groups": [3, 4, 1],
        "mlp_ratio": 2.7,
    },
    "sret_s": {
        "embed_dims": [6, 12, 24],
        "depths": [2, 2, 2],
        "num_blocks": [1, 1, 1],
        "num_heads": [1, 2, 3],
        "shuffle": "fixed",
    },
    "sret_t": {
        "embed_dims": [8, 8, 16],
        "depths": [4, 2, 2],
        "num_blocks": [2, 1, 1],
        "num_heads": [2, 2, 4],
        "img_size": [64, 96],
    },
}
SIDE = 96
"""Pixels: what every model takes."""


def build(name: str, **overrides) -> nn.Module:
    options = {"num_classes": 5, "drop_path_rate": 0.0}
    if "features_only" in overrides:
        del options["num_classes"]
    return settled(zoo.create_model(f"vision/{name}", **(SMALL[name] | options | overrides)))


def settled(model: nn.Module) -> nn.Module:
    """With running statistics, weights and biases that are not those of a fresh model, in eval mode."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            kind = 1.0 if name.endswith(("weight", "running_var")) else 0.0
            tensor.copy_(kind + 0.1 * torch.rand_like(tensor))
    return model.eval()


def images(batch: int = 2, channels: int = 3, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randn(batch, channels, height, width)
