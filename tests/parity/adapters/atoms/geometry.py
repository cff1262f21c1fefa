"""Harmonics, ranks, steps, envelopes and neighbour tables of both models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from domains.atoms.graph.biknn import FURTHER, STEPS, Knn, find_edges, image_pairs, soft_ranks
from domains.atoms.graph.features import lengths, log_envelope
from domains.atoms.graph.harmonics import spherical_harmonics
from domains.atoms.graph.pairs import pair_vectors
from domains.atoms.graph.tables import two_sided_table
from domains.atoms.structures import Structures
from parity.fixture import Fixture

MODELS = {"escaip": "sine", "allscaip": "bump"}


def geometry(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    given = fixture.spec["config"]
    unit, x, envelope = fixture.inputs("unit_vectors", "x", "env")
    out = {
        "output/spherical_harmonics_l9": spherical_harmonics(unit, 9),
        "output/log_envelope": log_envelope(envelope),
    }
    out |= _ranks(fixture, given)
    for model, step in MODELS.items():
        out[f"output/step_{model}"] = STEPS[step][0](x)
        knn = Knn(
            given["knn_k"],
            given["cutoff"],
            sigmoid_scale=given["rank_scale"],
            lse_scale=given["lse_scale"],
            step=step,
        )
        out |= _tables(fixture, model, knn)
    return out, {}


ADAPTERS = {"geometry operations": geometry}


def _ranks(fixture: Fixture, given: dict[str, Any]) -> dict[str, Tensor]:
    (distances,) = fixture.inputs("distances")
    rows, order = distances.sort(1)
    place = torch.arange(rows.shape[1]).expand_as(rows)
    out = {"output/rank_hard": torch.empty_like(rows).scatter(1, order, place.to(rows))}
    full = Knn(1, 1.0, low_mem=False, sigmoid_scale=given["rank_scale"])
    out["output/rank_soft_full"] = soft_ranks(distances, rows.shape[1], full)
    seen = given["lowmem_k"] + FURTHER
    for model, step in MODELS.items():
        knn = Knn(given["lowmem_k"], 1.0, sigmoid_scale=given["rank_scale"], step=step)
        ranks = torch.full_like(rows, torch.inf)
        ranks = ranks.scatter(1, order[:, :seen], soft_ranks(rows[:, :seen], seen, knn))
        out[f"output/rank_soft_lowmem_{model}"] = ranks
    return out


def _tables(fixture: Fixture, model: str, knn: Knn) -> dict[str, Tensor]:
    """The tables in the official width, and the gradient of the recorded sum over them."""
    pos, cell, weights = fixture.inputs("pos", "cell", "weights")
    pos = pos.clone().requires_grad_()
    batch = Structures.of(pos, torch.ones(len(pos)), cell=cell, pbc=torch.ones(1, 3))
    table = two_sided_table(find_edges(batch, knn), len(pos))
    source, width = table.source, weights.shape[1]

    def padded(rows: Tensor, fill: float) -> Tensor:
        missing = rows.new_full((len(rows), width - rows.shape[1], *rows.shape[2:]), fill)
        return torch.cat([rows, missing], 1)

    out = {
        f"{model}_disp": padded(source.vectors, 0.0),
        f"{model}_src_env": padded(source.envelope, torch.inf),
        f"{model}_neighbor": _stated(fixture, f"{model}_neighbor", source.index, source.mask),
    }
    if model == "allscaip":
        out[f"{model}_dst_env"] = padded(table.dst_envelope, torch.inf)
        used = {"src_index": source.mask, "dst_index": table.dst_envelope < 1}
        for name, mask in used.items():
            index = getattr(table, name)
            out[f"{model}_{name}"] = _stated(fixture, f"{model}_{name}", index, mask.expand_as(index))
        out[f"{model}_pair_distance"] = _pair_distance(batch, knn)
    known = log_envelope(source.envelope).masked_fill(~source.mask, 0.0)
    weights = weights[:, : source.mask.shape[1]]
    total = (known * weights).sum() + (source.vectors * weights[..., None]).sum()
    (slope,) = torch.autograd.grad(total, pos)
    return {f"output/{name}": value for name, value in out.items()} | {f"grad/{model}_pos": slope}


def _stated(fixture: Fixture, name: str, index: Tensor, mask: Tensor) -> Tensor:
    """Integers in the recorded layout; what unused slots hold is free."""
    out = fixture.tensors[f"output/{name}"].clone()
    place = out[..., : index.shape[-1]]
    place[mask] = index.to(out.dtype)[mask]
    return out


def _pair_distance(batch: Structures, knn: Knn) -> Tensor:
    """`(N, N)`: the nearest image of each pair."""
    pairs, count = image_pairs(batch, knn.cutoff), batch.num_atoms
    distance = lengths(pair_vectors(batch, pairs)).detach()
    place = pairs.centre * count + pairs.neighbour
    apart = torch.full((count * count,), torch.inf).scatter_reduce(0, place, distance, "amin")
    return apart.view(count, count).fill_diagonal_(0.0)
