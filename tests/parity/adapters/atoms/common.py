"""Structures of the fixtures, the layout of what they record, and the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from domains.atoms.graph.harmonics import spherical_harmonics
from domains.atoms.losses import energy_error, force_error, stress_error
from domains.atoms.models.potential import Potential
from domains.atoms.structures import Structures
from parity.fixture import Fixture


def structures(fixture: Fixture) -> Structures:
    names = ("cell", "pbc", "natoms", "charge", "spin", "fixed")
    options = dict(zip(names, fixture.inputs(*names), strict=True))
    return Structures.of(*fixture.inputs("pos", "atomic_numbers"), **options)


def in_place_of(fixture: Fixture, name: str, rows: Tensor, used: Tensor | None = None) -> Tensor:
    """Our rows in the layout of a recorded tensor; its own values where nothing is stated (unused places).

    Args:
        rows: what is computed, of as many leading entries on each axis as there are.
        used: bool, which entries of `rows` are stated.
    """
    out = fixture.tensors[name].clone()
    place = tuple(slice(n) for n in rows.shape)
    stated = out[place].to(rows.dtype)
    if used is not None:
        rows = torch.where(used.view(*used.shape, *[1] * (rows.ndim - used.ndim)), rows, stated)
    out = out.to(rows.dtype)
    out[place] = rows
    return out


def slot_order(fixture: Fixture, index: Tensor, unit: Tensor, mask: Tensor) -> Tensor:
    """`(N, K)`: which of our slots is the recorded one, where slots of equal envelope stand in any order.

    The neighbours that are used, and their number, are those of the official program.

    Args:
        index: `(N, K)` neighbours.
        unit: `(N, K, 3)` their directions.
        mask: `(N, K)` bool.
    """
    names = ("neighbor_list", "neighbor_mask", "edge_direction")
    theirs, used, towards = (fixture.tensors[f"output/graph_{name}"] for name in names)
    return matched_slots((theirs, towards, used.bool()), index, unit, mask)


def matched_slots(
    official: tuple[Tensor, Tensor, Tensor], index: Tensor, unit: Tensor, mask: Tensor
) -> Tensor:
    """`slot_order` from the official neighbours, directions and mask, with further rows and slots or not."""
    atoms, slots = index.shape
    theirs, towards, used = (values[:atoms] for values in official)
    assert torch.equal(used.sum(1), mask.sum(1)), "other numbers of neighbours"
    assert not bool(used[:, slots:].any()), "neighbours behind the end of our table"
    other = (theirs[:, :slots, None] != index[:, None]).float()
    apart = (towards[:, :slots, None] - unit[:, None]).norm(dim=-1)
    place = torch.arange(slots)
    cost = other + apart + 1e-4 * (place[:, None] - place).abs()
    cost = cost.masked_fill(used[:, :slots, None] != mask[:, None], torch.inf)
    least, order = cost.min(-1)
    order = torch.where(mask, order, place)
    assert bool((least[mask] < 1e-2).all()), "other neighbours"
    assert bool((order.sort(1).values == place).all()), "a neighbour twice"
    return order


def frequency_vectors(unit: Tensor, groups: list[int]) -> Tensor:
    """Harmonics over `sqrt(2l + 1)`, those of degree l `groups[l]` times: the definition that we need not."""
    harmonics = spherical_harmonics(unit, len(groups) - 1)
    parts = []
    for degree, count in enumerate(groups):
        block = harmonics[..., degree**2 : (degree + 1) ** 2] / (2 * degree + 1) ** 0.5
        parts += [block] * count
    return torch.cat(parts, -1)


def losses(
    fixture: Fixture, model: Potential, outputs: dict[str, Tensor], batch: Structures, reduction: str
) -> dict[str, Tensor]:
    """`loss/*`: each term with its weight, and their sum."""
    given = fixture.spec["loss"]
    references = torch.tensor(given["element_refs"], dtype=torch.float64)
    scale = model.scale
    known = min(len(references), len(scale.element_references))
    scale.element_references[:known] = references[:known]
    scale.energy_mean.fill_(given["mean_e"])
    scale.energy_rmsd.fill_(given["rmsd_e"])
    (energy, forces) = fixture.inputs("target_energy", "target_forces")
    rmsd = given["rmsd_f"]
    terms = {
        "energy": energy_error(outputs["energy"], energy, batch, scale),
        "forces": force_error(outputs["forces"], forces / rmsd, batch, reduction),
    }
    weights = {"energy": given["ce"], "forces": given["cf"]}
    if "stress" in outputs:
        (stress,) = fixture.inputs("target_stress")
        terms["stress"] = stress_error(outputs["stress"], stress.view(-1, 3, 3) / rmsd)
        weights["stress"] = given["cs"]
    weighted = {name: weights[name] * term for name, term in terms.items()}
    weighted["total"] = torch.stack(list(weighted.values())).sum()
    return {f"loss/{name}": term.reshape(1) for name, term in weighted.items()}
