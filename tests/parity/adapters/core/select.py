"""Selection: native sparse, lightning-indexed and landmark attention, routing, hierarchical memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from parity.fixture import Fixture
from zoo.attention import Causal, attend, capture
from zoo.attention.layers.hcam import HierarchicalMemory
from zoo.attention.layers.landmark import GroupedSoftmax
from zoo.attention.layers.routing import RoutedHeads
from zoo.attention.layers.sparse import index_scores, lightning_index, native_sparse
from zoo.attention.select import attend_blocks

Result = tuple[dict[str, Tensor], dict[str, Any]]


def _finish(
    fixture: Fixture, inputs: dict[str, Tensor], outputs: dict[str, Tensor], params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs, loss and gradients under the names of the fixture."""
    cotangents = {name: fixture.tensors.get(f"input/cotangent_{name}") for name in outputs}
    loss = sum((outputs[name] * c).sum() for name, c in cotangents.items() if c is not None)
    assert isinstance(loss, Tensor)
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    leaves |= {f"param.{name}": x for name, x in params.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return (
        {f"output/{name}": x for name, x in outputs.items()}
        | {f"grad/{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        | {"loss/total": loss.reshape(1)}
    )


def _leaves(fixture: Fixture) -> dict[str, Tensor]:
    """The inputs that are differentiated, and the others, without the cotangents."""
    names = [name.removeprefix("input/") for name in fixture.tensors if name.startswith("input/")]
    return {
        name: fixture.tensors[f"input/{name}"].clone().requires_grad_(f"grad/{name}" in fixture.tensors)
        for name in names
        if not name.startswith("cotangent")
    }


def _in_order_of(expected: Tensor, index: Tensor) -> Tensor:
    """Our indices, at the places where the same ones stand in `expected`: rows are compared as sets."""
    return torch.empty_like(index).scatter(-1, expected.argsort(-1), index.sort(-1).values)


def _same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=2e-6, rtol=1e-5)


def nsa(fixture: Fixture) -> Result:
    config, inputs = fixture.spec["config"], _leaves(fixture)
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    size = config["block_size"]
    found = native_sparse(q, k, v, block_size=size, num_selected=config["num_selected"])
    with capture():  # whole rows
        _same(attend_blocks(q, k, v, found.index, size), found.selected)
    selected, compressed = (x.transpose(1, 2) for x in (found.selected, found.compressed))
    gates = inputs["gates"]
    index = _in_order_of(fixture.tensors["output/block_indices"], found.index.transpose(1, 2))
    outputs = {
        "o": gates[..., :1] * selected + gates[..., 1:2] * compressed,
        "o_compressed": compressed,
        "o_selected": selected,
        "block_indices": index,
    }
    return _finish(fixture, inputs, outputs, {}), {}


def dsa(fixture: Fixture) -> Result:
    inputs = _leaves(fixture)
    q, k, v, q_index = (inputs[name].transpose(1, 2) for name in ("q", "k", "v", "q_idx"))
    k_index, weights = inputs["k_idx"][:, None], inputs["w_idx"].transpose(1, 2)
    number = fixture.spec["config"]["topk"]
    scores = index_scores(q_index, k_index, weights)[:, 0]
    best = scores.topk(min(number, scores.shape[-1]))
    ours = lightning_index(q_index, k_index, weights, number)[:, 0]
    chosen = scores.gather(-1, ours.clamp(min=0)).masked_fill(ours < 0, -torch.inf)
    _same(chosen.sort(-1, descending=True).values, best.values)
    # Keys that no indexer head likes all score 0; the reference leaves the choice among them to topk.
    index = best.indices.masked_fill(best.values == -torch.inf, -1).sort(-1).values
    out = attend_blocks(q, k, v, index[:, None])
    outputs = {"o": out.transpose(1, 2), "indices": index}
    return _finish(fixture, inputs, outputs, {}), {}


def landmark(fixture: Fixture) -> Result:
    inputs = _leaves(fixture)
    q, k, v = (inputs[name] for name in "qkv")
    kernel = GroupedSoftmax(inputs["is_mem"])
    out = attend(q, k, v, pattern=Causal(), kernel=kernel)
    with capture() as maps:
        attend(q, k, v, pattern=Causal(), kernel=kernel)
    computed = _finish(fixture, inputs, {"o": out}, {})
    return computed | {"output/weights": maps["attend"].weights}, {}


def routing(fixture: Fixture) -> Result:
    config, inputs = fixture.spec["config"], _leaves(fixture)
    state = {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}
    heads, _, memory, width = state["mem_key"].shape
    module = RoutedHeads(
        heads,
        width,
        num_clusters=config["num_clusters"],
        window_size=config["window_size"],
        context_window_size=config.get("context_window_size"),
        causal=config["causal"],
        shared_qk=config["shared_qk"],
        num_memory=memory,
        ema_decay=config["ema_decay"],
        commitment=config["commitment"],
        mask_first=False,
    )
    module.load_state_dict(state)
    masks = inputs.get("mask"), inputs.get("context_mask", inputs.get("key_mask"))
    out, loss = module.eval()(inputs["q"], inputs.get("k"), inputs["v"], *masks)
    params = {name: p for name, p in module.named_parameters() if p.numel()}
    return _finish(fixture, inputs, {"o": out, "aux_loss": loss.reshape(1)}, params), {}


def hcam(fixture: Fixture) -> Result:
    config, inputs = fixture.spec["config"], _leaves(fixture)
    layer = HierarchicalMemory(
        config["feature_size"],
        config["num_heads"],
        k=config["k"],
        position_encoding=config["memory_position_encoding"],
    )
    weights = {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}
    layer.load_state_dict(
        {
            name.replace("/w", ".weight").replace("/b", ".bias").replace("/", "."): x.mT if x.ndim == 2 else x
            for name, x in ((name.replace("mem_attn/", "mem_attn."), x) for name, x in weights.items())
        }
    )
    out = layer.read(inputs["q"], inputs["contents"], inputs["keys"], inputs.get("mask"))
    return _finish(fixture, inputs, {"o": out}, {}), {}


ADAPTERS: dict[str, Callable[[Fixture], Result]] = {
    "op_nsa": nsa,
    "op_dsa": dsa,
    "op_landmark": landmark,
    "routing": routing,
    "hcam": hcam,
}
