"""Edges cut into tiles, and computed twice to save memory: the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from domains.atoms.bench import crystal, molecule, potential
from domains.atoms.models import escaip
from domains.atoms.models.escaip import EScAIP
from domains.atoms.models.escaip_network import tiling
from domains.atoms.models.escaip_parts import Block
from domains.atoms.structures import Structures

CPU = torch.device("cpu")


def mixed() -> Structures:
    """Structures whose atoms have different numbers of neighbours."""
    disordered = crystal("Cu", 32)
    disordered.rattle(0.3, seed=1)
    return Structures.from_ase([disordered, molecule(), crystal("Si", 8)], dtype=torch.float64)


def small(forces: str, **options: Any) -> EScAIP:
    stress = forces == "conservative"
    return potential("escaip_mini", CPU, forces=forces, stress=stress, num_layers=2, **options).double()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, equal_nan=True)


def cut(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    monkeypatch.setitem(escaip.TILE_VALUES, "cpu", values)


def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escaip, "KEPT_VALUES", 0)


def test_tiles_hold_all_atoms_by_falling_number_of_neighbours() -> None:
    mask = torch.arange(12) < torch.randint(1, 13, (40, 1), generator=torch.Generator().manual_seed(0))
    found = tiling(mask, slots=100)
    assert found is not None
    counts = mask.sum(1)[found.order]
    assert torch.equal(found.order[found.place], torch.arange(40))
    assert [tile[0] for tile in found.tiles[1:]] == [tile[1] for tile in found.tiles[:-1]]
    assert (found.tiles[0][0], found.tiles[-1][1]) == (0, 40)
    for start, stop, width in found.tiles:
        assert width == counts[start:stop].amax()
        assert (stop - start) * width <= 100


def test_few_edges_are_one_tile_and_one_atom_is_a_tile() -> None:
    mask = torch.ones(4, 5, dtype=torch.bool)
    assert tiling(mask, slots=20) is None
    found = tiling(mask, slots=3)
    assert found is not None
    assert [tile[:2] for tile in found.tiles] == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_training_gradients_do_not_depend_on_tiles(forces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, structures = small(forces), mixed()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(structures)
        (outputs["energy"].sum() + outputs["forces"].square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    cut(monkeypatch, 2**13)
    assert_same(gradients(), expected)


def test_what_is_not_kept_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structures = small("conservative"), mixed()
    cut(monkeypatch, 2**13)
    calls, tile = [], Block._tile

    def counted(self: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
        calls.append(self)
        return tile(self, *inputs)

    monkeypatch.setattr(Block, "_tile", counted)
    with torch.no_grad():
        expected = model(structures)
        once = len(calls)
        keep_nothing(monkeypatch)
        assert_same(model(structures), expected)
    assert len(calls) == 3 * once


def test_training_keeps_all_and_differentiates_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("conservative")
    keep_nothing(monkeypatch)
    structures = Structures.from_ase([molecule()], dtype=torch.float64)
    model(structures)["forces"].square().sum().backward()
    blocks: Any = model.network.blocks
    weight = blocks[0].attention.edge_hidden.weight
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_weights_are_as_trainable_after_inference_as_before() -> None:
    model = small("conservative")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        model(mixed())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert any(before.values())
    assert not all(before.values())


def test_both_directions_of_a_pair_share_a_length() -> None:
    graph = small("direct").graph(mixed())
    lengths = graph.vectors.norm(dim=-1)
    torch.testing.assert_close(graph.lengths[graph.pair], lengths, rtol=1e-12, atol=1e-12)
    used = int(graph.mask.sum()) - len(graph.numbers)
    assert 2 * (len(graph.lengths) - 1) == used
