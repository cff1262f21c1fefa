"""From positions to tables: each part against its dense definition."""

from __future__ import annotations

from math import ceil, pi

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from domains.atoms.graph.biknn import FURTHER, STEPS, Edges, Knn, find_edges
from domains.atoms.graph.features import DistanceExpansion, bond_order, directions, lengths, log_envelope
from domains.atoms.graph.harmonics import legendre, spherical_harmonics
from domains.atoms.graph.tables import neighbour_table, two_sided_table
from domains.atoms.structures import Structures, completed
from zoo.errors import ConfigError

# ---- harmonics ---------------------------------------------------------------------------------------------


def sphere(degree: int) -> tuple[Tensor, Tensor]:
    """Points and weights that integrate polynomials up to `degree` exactly, the weights adding up to 1."""
    heights, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    angles = 2 * pi * np.arange(degree + 1) / (degree + 1)
    z, angle = (torch.tensor(grid.flatten()) for grid in np.meshgrid(heights, angles, indexing="ij"))
    radius = (1 - z.square()).sqrt()
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), z], 1)
    return points, torch.tensor(weights / 2).repeat_interleave(degree + 1) / (degree + 1)


def test_harmonics_are_orthonormal_on_the_sphere() -> None:
    """The mean of Y_i Y_j is 1 for i = j and 0 otherwise ("component" normalisation), up to degree 9."""
    points, weights = sphere(18)
    values = spherical_harmonics(points, 9)
    gram = values.T @ (values * weights[:, None])
    assert torch.allclose(gram, torch.eye(100, dtype=torch.float64), atol=1e-12)


def test_harmonics_of_low_degree_stand_in_e3nns_order() -> None:
    unit = directions(torch.randn(50, 3, dtype=torch.float64))
    x, y, z = unit.unbind(1)
    second = [15**0.5 * x * z, 15**0.5 * x * y, 5**0.5 * (y**2 - (x**2 + z**2) / 2), 15**0.5 * y * z]
    second.append(15**0.5 / 2 * (z**2 - x**2))
    expected = torch.cat([torch.ones(50, 1), 3**0.5 * unit, torch.stack(second, 1)], 1)
    assert torch.allclose(spherical_harmonics(unit, 2), expected)


def test_the_addition_theorem_holds_also_without_a_direction() -> None:
    unit = directions(torch.randn(12, 3, dtype=torch.float64))
    unit[3] = 0
    present = (unit != 0).any(1).double()
    planes = legendre(unit @ unit.T, 6, present[:, None] * present)
    values = spherical_harmonics(unit, 6)
    for degree, plane in enumerate(planes):
        block = values[:, degree**2 : (degree + 1) ** 2]
        assert torch.allclose(block @ block.T / (2 * degree + 1), plane, atol=1e-12)


# ---- features ----------------------------------------------------------------------------------------------


def test_the_zero_vector_has_neither_direction_nor_gradient() -> None:
    vectors = torch.tensor([[0.0, 0, 0], [0, 3, 4]], requires_grad=True)
    unit, length = directions(vectors), lengths(vectors)
    assert unit.tolist() == [[0, 0, 0], [0, pytest.approx(0.6), pytest.approx(0.8)]]
    assert length.tolist() == [0, 5]
    (slope,) = torch.autograd.grad(unit.sum() + length.sum(), vectors)
    assert bool(slope.isfinite().all())
    assert not slope[0].any()


@pytest.mark.parametrize("kind", ["gaussian", "sigmoid", "linear_sigmoid"])
def test_expansions_are_their_formula(kind: str) -> None:
    distance, centres = torch.rand(7, dtype=torch.float64) * 5, torch.linspace(0, 5, 11, dtype=torch.float64)
    offset = distance[:, None] - centres
    expected = {
        "gaussian": torch.exp(-0.5 / (2 * 0.5) ** 2 * offset**2),
        "sigmoid": torch.sigmoid(2 * offset / 0.5),
        "linear_sigmoid": torch.sigmoid(2 * offset / 0.5) + 0.001 * 2 * offset / 0.5,
    }[kind]
    assert torch.allclose(DistanceExpansion(kind, 11, 5.0).double()(distance), expected, atol=1e-6)


def test_an_unknown_expansion_is_named() -> None:
    with pytest.raises(ConfigError, match=r"not 'linearsigmoid'\. Did you mean 'linear_sigmoid'"):
        DistanceExpansion("linearsigmoid", 8, 5.0)


def test_bond_order_of_an_octahedron() -> None:
    """Six neighbours and the atom itself: degree 1 vanishes, degree 4 is 6/7 of the known 0.7638."""
    ways = torch.cat([torch.zeros(1, 3), torch.eye(3), -torch.eye(3), torch.ones(2, 3)])
    mask = torch.arange(9) < 7
    orders = bond_order(ways[None], mask[None], 5)[0]
    assert orders.tolist() == pytest.approx([1, 1e-3, 1e-3, 1e-3, 6 / 7 * (7 / 12) ** 0.5], abs=1e-6)


def test_log_envelope_ends_at_one() -> None:
    values = log_envelope(torch.tensor([0.0, 0.5, 1.0, torch.inf]))
    assert values.tolist() == [0, pytest.approx(-1 / 3), -torch.inf, -torch.inf]
    assert log_envelope(torch.tensor([0.5, 1.0]), smooth=False).tolist() == [0, -torch.inf]


# ---- who is a neighbour ------------------------------------------------------------------------------------


def dense_edges(structures: Structures, knn: Knn) -> dict[tuple[int, ...], float]:
    """The definition, for one structure: all pairs with all images, ranked from both sides."""
    pos, cell = structures.positions, completed(structures.cell, structures.pbc)[0]
    reach = knn.cutoff + (0 if knn.soft and not knn.low_mem else knn.margin + cell.norm(dim=1).max())
    heights = 1 / torch.linalg.inv(structures.cell[0]).norm(dim=0)  # as published, of the cell as it is given
    axes = [
        torch.arange(-n, n + 1) if periodic else torch.zeros(1, dtype=torch.long)
        for h, periodic in zip(heights.tolist(), structures.pbc[0].tolist(), strict=True)
        for n in [ceil(reach / h)]
    ]
    images = torch.cartesian_prod(*axes)
    count = len(pos)
    r = ((pos[:, None] + images.to(pos) @ cell)[None] - pos[:, None, None]).norm(dim=-1)
    source = dense_ranks(r.reshape(count, -1), knn).view_as(r)
    destination = dense_ranks(r.transpose(0, 1).reshape(count, -1), knn).view_as(r).transpose(0, 1)
    parts = torch.stack([source / knn.k, destination / knn.k, r / knn.cutoff])
    envelope = knn.lse_scale * (parts / knn.lse_scale).logsumexp(0) if knn.soft else parts.amax(0)
    envelope[r == 0] = 1.0
    found = (envelope < 1).nonzero().tolist()
    return {(i, j, *images[m].tolist()): float(envelope[i, j, m]) for i, j, m in found}


def dense_ranks(r: Tensor, knn: Knn) -> Tensor:
    if not knn.soft:
        return r.argsort(dim=1, stable=True).argsort(dim=1).to(r)
    step = STEPS[knn.step][0] if knn.low_mem else torch.sigmoid
    if not knn.low_mem:
        return step((r[:, :, None] - r[:, None]) / knn.sigmoid_scale).sum(-1)
    rows, order = r.sort(1)
    rows, order = rows[:, : knn.k + FURTHER], order[:, : knn.k + FURTHER]
    ranks = step((rows[:, :, None] - rows[:, None]) / knn.sigmoid_scale).sum(-1)
    return torch.full_like(r, torch.inf).scatter(1, order, ranks)


def sparse_edges(structures: Structures, knn: Knn) -> dict[tuple[int, ...], float]:
    edges = find_edges(structures, knn)
    cell = completed(structures.cell, structures.pbc)[0]
    offset = edges.vectors - structures.positions[edges.neighbour] + structures.positions[edges.centre]
    shift = (offset @ torch.linalg.inv(cell)).round().long()
    keys = torch.cat([edges.centre[:, None], edges.neighbour[:, None], shift], 1)
    return {tuple(key): value for key, value in zip(keys.tolist(), edges.envelope.tolist(), strict=True)}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 7),
    pbc=st.tuples(*[st.booleans()] * 3),
    mode=st.sampled_from([("soft", "sine"), ("soft", "bump"), ("full", "sine"), ("hard", "sine")]),
    k=st.integers(2, 12),
)
@example(seed=3007, count=2, pbc=(True, False, False), mode=("full", "sine"), k=4)
def test_sparse_ranks_are_the_dense_definition(
    seed: int, count: int, pbc: tuple[bool, ...], mode: tuple[str, str], k: int
) -> None:
    """Hard ranks without images: two opposite ones are equally far, and rounding says which comes first."""
    structures = random_structure(seed, count, pbc if mode[0] != "hard" else (False,) * 3)
    knn = Knn(k, 4.0, soft=mode[0] != "hard", low_mem=mode[0] != "full", step=mode[1])
    expected, found = dense_edges(structures, knn), sparse_edges(structures, knn)
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key], abs=1e-12) for key in found)


def random_structure(seed: int, count: int, pbc: tuple[bool, ...]) -> Structures:
    draw = np.random.default_rng(seed)
    cell = np.diag(draw.uniform(2.5, 6.0, 3)) + draw.normal(0, 0.3, (3, 3))
    positions = draw.uniform(0, 1, (count, 3)) @ cell
    return Structures.of(
        torch.tensor(positions), torch.ones(count), cell=torch.tensor(cell), pbc=torch.tensor(pbc)
    ).wrapped()


@pytest.mark.parametrize("step", ["sine", "bump"])
@pytest.mark.parametrize("low_mem", [True, False])
def test_first_and_second_derivatives_of_the_envelope(step: str, low_mem: bool) -> None:
    structures = random_structure(3, 2, (True, False, False))
    knn = Knn(6, 4.0, low_mem=low_mem, step=step)

    def envelope(positions: Tensor) -> tuple[Tensor, Tensor]:
        structures.positions = positions
        edges = find_edges(structures, knn)
        return edges.vectors, log_envelope(edges.envelope)

    positions = structures.positions.clone().requires_grad_()
    assert len(envelope(positions)[0]) > 4
    assert torch.autograd.gradcheck(envelope, positions)
    assert torch.autograd.gradgradcheck(envelope, positions)


def test_a_neighbour_leaves_smoothly() -> None:
    """Its weight as a key falls to 0 before it is gone, through ranks and through the cutoff alike."""
    weights = []
    for x in torch.linspace(3.0, 4.2, 100, dtype=torch.float64).tolist():
        line = [[0.0, 0, 0], [1.5, 0, 0], [0, 1.7, 0], [x, 0, 0]]
        structures = Structures.of(torch.tensor(line, dtype=torch.float64), torch.ones(4))
        table = neighbour_table(find_edges(structures, Knn(6, 4.0)), 4)
        weights.append(log_envelope(table.envelope[0]).exp().sum())
    steps = torch.stack(weights).diff().abs()
    assert float(weights[0] - weights[-1]) > 0.1
    assert float(steps.max()) < 0.04


def test_a_lone_atom_has_itself_alone() -> None:
    structures = Structures.from_ase([Atoms("H"), molecule("H2"), Atoms("He")])
    table = neighbour_table(find_edges(structures, Knn(8, 5.0)), 4)
    assert table.index.tolist() == [[0, 0], [1, 2], [2, 1], [3, 3]]
    assert table.mask.tolist() == [[True, False], [True, True], [True, True], [True, False]]
    assert float(table.envelope[0, 0]) == 0


def test_a_batch_has_the_tables_of_its_members() -> None:
    frames = [molecule("CH3OH"), bulk("Cu", cubic=True), Atoms("H")]
    knn, start = Knn(10, 4.5), 0
    batch = Structures.from_ase(frames, torch.float64)
    whole = neighbour_table(find_edges(batch, knn), batch.num_atoms)
    for frame in frames:
        single = Structures.from_ase([frame], torch.float64)
        table = neighbour_table(find_edges(single, knn), len(frame))
        rows, width = slice(start, start + len(frame)), table.index.shape[1]
        assert torch.equal(whole.index[rows, :width] - start, table.index)
        assert torch.equal(whole.mask[rows].sum(1), table.mask.sum(1))
        assert torch.allclose(whole.envelope[rows, :width], table.envelope)
        start += len(frame)


# ---- tables ------------------------------------------------------------------------------------------------


def two_sided(width: int | None = None) -> tuple[Edges, int, Structures]:
    structures = random_structure(5, 6, (True, True, False))
    edges = find_edges(structures, Knn(9, 4.0))
    return edges, 6, structures


def test_layouts_are_each_others_inverse() -> None:
    edges, count, _ = two_sided()
    table = two_sided_table(edges, count)
    there, back = table.dst_index, table.src_index
    x = torch.randn(table.source.index.shape)
    assert torch.equal(x[there[0], there[1]][back[0], back[1]], x)
    neighbour = table.source.index[there[0], there[1]]
    used = table.dst_envelope < 1
    own = torch.arange(count)[:, None].expand_as(neighbour)
    assert torch.equal(neighbour[used], own[used])
    assert table.dropped == 0


def test_truncation_keeps_what_is_near_from_both_sides() -> None:
    edges, count, _ = two_sided()
    whole, cut = two_sided_table(edges, count), two_sided_table(edges, count, 5)
    assert cut.source.index.shape[1] == 5
    assert whole.source.index.shape[1] > 5
    there = whole.src_index[1]
    slots = torch.arange(there.shape[1]).expand_as(there)
    kept = whole.source.mask & (slots < 5) & (there < 5)
    assert int(cut.source.mask.sum()) == int(kept.sum())
    assert cut.dropped == int(whole.source.mask.sum() - kept.sum())


@pytest.mark.parametrize(("options", "message"), [({"k": 0}, "knn_k"), ({"lse_scale": 0.0}, "knn_lse_scale")])
def test_neighbours_need_sensible_numbers(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Knn(**{"k": 4, "cutoff": 3.0} | options)  # pyright: ignore[reportArgumentType]
