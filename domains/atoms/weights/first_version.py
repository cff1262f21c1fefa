"""The first version of EScAIP: a different model of the same name, whose checkpoints are refused."""

from __future__ import annotations

from collections.abc import Iterable

from zoo.errors import CheckpointError

MARK = "multi_head_attention.in_proj_weight"
RENAMED = {
    "multi_head_attention": "attn_in_proj_q, _k, _v and attn_out_proj",
    "edge_linear": "edge_attr_linear",
    "node_linear": "node_hidden_linear",
    "energy_ffn": "node_ffn",
    "energy_norm": "pre_node_norm",
    "force_ffn": "edge_ffn",
    "force_norm": "pre_edge_norm",
    "readout_norm": "output_norm_node, output_norm_edge",
}
"""Parts of tensor names of the first version, and those of the second that take their place."""


def refuse_first_version(names: Iterable[str]) -> None:
    """Raises where tensors are those of the first version (the paper's program, before September 2025).

    It has another graph, other attention and other heads: there is nothing to convert.

    Raises:
        CheckpointError: it is; the message says which keys differ.
    """
    names = list(names)
    if not any(name.endswith(MARK) for name in names):
        return
    parts = {part for name in names for part in name.split(".")}
    differing = "; ".join(f"{old} instead of {new}" for old, new in RENAMED.items() if old in parts)
    raise CheckpointError(
        "The file is a checkpoint of the first version of EScAIP, a different model (radius graph without "
        f"self edge, no envelope). Only the second version can be loaded. The file has {differing}."
    )
